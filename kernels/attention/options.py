"""The options of causal attention: one dataclass, its checks and its defaults."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.dropout import resolve_dropout

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
        cu_seqlens: cumulative lengths of the documents that are packed in a batch of 1,
            (documents + 1,) int32, contiguous; None without documents.
    """

    scale: float
    window: int
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def with_tensors(self, seed: Tensor | None, cu_seqlens: Tensor | None) -> "AttentionOptions":
        """Return a copy with these tensors.

        Autograd saves the tensors with save_for_backward, because activation checkpointing does not
        see attributes of ctx. It keeps the other options in ctx.
        """
        return replace(self, seed=seed, cu_seqlens=cu_seqlens)


def check_head_size(name: str, head_size: int) -> None:
    """Raise a ValueError for a head size that the kernels do not support."""
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(
            f"{name}: the head size must be from 1 to {MAX_HEAD_SIZE}, got {head_size}"
        )


def check_score_options(
    name: str, *, scale: float | None, window: int | None, softcap: float | None
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
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(
            f"{name}: softcap must be None, 0 (none) or positive and finite, got {softcap}"
        )


def resolve_options(
    name: str,
    head_size: int,
    keys: int,
    device: torch.device,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> AttentionOptions:
    """Check the options of a public function and fill in their defaults."""
    check_head_size(name, head_size)
    check_score_options(name, scale=scale, window=window, softcap=softcap)
    dropout = resolve_dropout(name, dropout_p, seed, device)
    return AttentionOptions(
        scale=1 / math.sqrt(head_size) if scale is None else float(scale),
        window=keys if window is None else min(window, keys),
        softcap=float(softcap or 0.0),
        dropout_p=dropout.dropout_p,
        seed=dropout.seed,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
    )
