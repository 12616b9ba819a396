"""Dropout of a matrix x (M, N) without a stored mask.

    forward    y = z x      z = kept / (1 - dropout_p), kept is 0 or 1
    backward   dx = z dy    computes the same z again

Random bits depend only on the seed and on the place (m, n): word n % 4 of Philox counter
m ceil(N / 4) + n / 4. An element is kept if the word, as a signed number, is at least
dropout_p 2^32 - 2^31.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import wide
from .philox import random_words
from .triton import cdiv, tl, triton


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Options of dropout as operators take them: checked, and with the defaults filled in.

    Fields:
        dropout_p: probability of dropping an element, in [0, 1).
        seed: seed of the mask, () int64 on the device of the inputs; None without dropout.
    """

    dropout_p: float = 0.0
    seed: Tensor | None = None

    @property
    def arguments(self) -> dict:
        """Arguments of kernels. None compiles a kernel without dropout."""
        has_dropout = self.dropout_p > 0
        return {
            "seed_ptr": self.seed,
            "threshold": threshold_of(self.dropout_p) if has_dropout else None,
            "scale": 1 / (1 - self.dropout_p) if has_dropout else None,
        }


def threshold_of(dropout_p: float) -> int:
    """Return the threshold: an element is kept if its word, a signed number, is not below it."""
    return int(dropout_p * 2**32) - 2**31


def check_dropout_p(name: str, dropout_p: float) -> None:
    """Raise a ValueError unless `dropout_p` is a probability below 1. `name` is the operator."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name}: dropout_p must be in [0, 1), got {dropout_p}")


def resolve_dropout(
    name: str, dropout_p: float, seed: int | Tensor | None, device: torch.device
) -> Dropout:
    """Check the options of a public function and draw a seed if there is none.

    `name` is the operator, for the messages. Without dropout the seed is ignored.
    """
    check_dropout_p(name, dropout_p)
    if dropout_p == 0:
        return Dropout()
    return Dropout(dropout_p=float(dropout_p), seed=_seed_tensor(name, seed, device))


def _seed_tensor(name: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return the seed as a tensor. A CUDA graph would freeze a seed that is passed as a number."""
    if seed is None:
        return torch.randint(2**62, (), device=device)
    if not isinstance(seed, Tensor):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"{name}: seed must be from -2**63 to 2**64 - 1, got {seed}")
        # torch.initial_seed() may return any 64 bits. int64 holds the same bits as a signed number.
        seed = seed - 2**64 if seed >= 2**63 else seed
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.shape != () or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"{name}: seed must be an int or a () int64 tensor on {device}, "
            f"got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    return seed


# --- for references


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """Return z x in at least float32, for x (..., N). Without dropout, return x."""
    if dropout.dropout_p == 0:
        return x
    x = wide(x)
    N = x.shape[-1]
    kept = kept_elements(x.numel() // N, N, dropout).view(x.shape)
    return x * kept.to(x.dtype).mul_(1 / (1 - dropout.dropout_p))


def kept_elements(M: int, N: int, dropout: Dropout) -> Tensor:
    """Return True for the elements to keep, (M, N)."""
    quads = cdiv(N, 4)
    counter = torch.arange(M * quads, device=dropout.seed.device)
    words = torch.stack(random_words(dropout.seed, counter), dim=-1)
    return words.view(M, 4 * quads)[:, :N] >= threshold_of(dropout.dropout_p)


# --- for kernels


@triton.jit
def kept_tile(seed, rows, first_column, N, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return True for the elements to keep, for BLOCK_M rows and BLOCK_N columns.

    Args: rows: (BLOCK_M,) int64. first_column and BLOCK_N: multiples of 4.
    """
    quads = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    counter = rows[:, None] * tl.cdiv(N, 4) + quads[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    # These joins and the reshape put the four words of a counter next to each other, in order.
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return pairs.reshape(BLOCK_M, BLOCK_N).to(tl.int32, bitcast=True) >= threshold
