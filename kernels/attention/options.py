"""The options of causal attention: one dataclass, its checks and its defaults."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_HEAD_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Options as the operators take them: checked, and with all defaults filled in.

    Fields:
        scale: multiplies q k^T.
        window: how many keys a query sees, itself included; the number of keys if it sees all.
        softcap: c > 0 replaces a score s by c tanh(s / c); 0: scores stay as they are.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: seed of the dropout mask, () int64 on the device of q; None without dropout.
    """

    scale: float
    window: int
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


def check_score_options(
    name: str, *, scale: float | None, window: int | None, softcap: float
) -> None:
    """Check the options that act on the scores. `name` is the operator for the messages."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(
            f"{name}: scale must be None (1 / sqrt(K)) or positive and finite, got {scale}"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"{name}: window must be None or at least 1 key (a query sees itself), got {window}"
        )
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap must be 0 (none) or positive and finite, got {softcap}")


def resolve_options(
    name: str,
    head_size: int,
    keys: int,
    device: torch.device,
    scale: float | None,
    window: int | None,
    softcap: float,
    dropout_p: float,
    seed: int | Tensor | None,
) -> AttentionOptions:
    """Check the options of a public function and fill in their defaults."""
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(
            f"{name}: the head size must be from 1 to {MAX_HEAD_SIZE}, got {head_size}"
        )
    check_score_options(name, scale=scale, window=window, softcap=softcap)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name}: dropout_p must be in [0, 1), got {dropout_p}")
    return AttentionOptions(
        scale=1 / math.sqrt(head_size) if scale is None else float(scale),
        window=keys if window is None else min(window, keys),
        softcap=float(softcap),
        dropout_p=float(dropout_p),
        seed=_seed_tensor(name, seed, device) if dropout_p > 0 else None,
    )


def _seed_tensor(name: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return the seed as a tensor. A CUDA graph would freeze a seed that is passed as a number."""
    if seed is None:
        return torch.randint(2**62, (), device=device)
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.shape != () or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"{name}: seed must be an int or a () int64 tensor on {device}, "
            f"got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    return seed
