"""What cross_entropy and linear_cross_entropy share: the loss of a block of rows of logits, its gradient, and the checks.

    s = c tanh(logits / c) with a softcap c, else logits        lse = log sum_v exp(s_v)        p = exp(s - lse)
    loss     l = (1 - eps) (lse - s_t) + eps (lse - mean_v(s)) + z lse^2
    gradient dl/ds = p (1 + 2 z lse) - (1 - eps) [v = t] - eps / V        dl/dlogits = dl/ds (1 - (s / c)^2)

A row whose target is ignore_index has no loss and no gradient; one whose target is no column at all has NaN for both.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.layout import wide
from ..core.op import can_read_values

REDUCTIONS = ("mean", "sum", "none")
# A block of 4 MB in float32 stays in a CPU's cache with what is computed from it; smaller ones only make more calls.
BLOCK_ELEMENTS = 1 << 20
# What a lane of a GPU loads at once, from addresses that are multiples of it.
LOAD_BYTES = 16
# The square of this, and of its reciprocal, is a number in float32.
MOST_OPTION = 1e18


class Options(NamedTuple):
    """What a loss can be told beside its tensors, in the order in which the operators take it."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


# --- rows


def blocks(x: Tensor, plan: Callable[[int, int], int], V: int) -> Iterator[slice]:
    """Slices of plan(N, V) of the N rows of `x`, the last one shorter."""
    N = x.shape[0]
    step = plan(N, V)
    for start in range(0, N, step):
        yield slice(start, min(start + step, N))


def empty_gradient(logits: Tensor) -> Tensor:
    """An uninitialized (N, V) whose rows begin as far from a multiple of LOAD_BYTES, counted from the first, as the logits'."""
    N, V = logits.shape
    stride = V + (logits.stride(0) - V) % (LOAD_BYTES // logits.itemsize)
    return torch.empty_strided((N, V), (stride, 1), dtype=logits.dtype, device=logits.device)


def check_targets(name: str, target: Tensor, V: int, ignore_index: int) -> None:
    """Raise for a target that is neither a column nor ignore_index, where looking costs no synchronization."""
    if not can_read_values(target):
        return
    outside = (target != ignore_index) & ((target < 0) | (target >= V))
    if outside.any():
        bad = target[outside]
        raise IndexError(
            f"{name}: target must be from 0 to {V - 1} or ignore_index ({ignore_index}), got {bad[0].item()}"
            f"{f' and {bad.numel() - 1} more' if bad.numel() > 1 else ''}; check the vocabulary's size"
        )


def row_weights(
    target: Tensor, V: int, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a column to read in each row, int64, and the row's weight: 1, 0 if it is ignored, NaN if its target is bad."""
    counted, inside = target != ignore_index, (target >= 0) & (target < V)
    weight = counted.to(dtype).masked_fill_(counted & ~inside, float("nan"))
    return target.masked_fill(~(inside & counted), 0).long(), weight


def weighted(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows` times their weights; what an ignored row holds never counts, be it NaN."""
    return (rows * weight).masked_fill_(weight == 0, 0.0)


def reduced(loss: Tensor, weight: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Return the weighted losses as their mean over the rows that count, their sum or as they are, and the divisor.

    That is () int64: how many rows count, at least 1, for the mean; else 1.
    """
    loss = weighted(loss, weight)
    if reduction == "mean":
        divisor = (weight != 0).sum().clamp_(min=1)
        return loss.sum() / divisor, divisor
    divisor = torch.ones((), dtype=torch.int64, device=loss.device)
    return (loss.sum() if reduction == "sum" else loss), divisor


# --- the loss of a block and its gradient


def capped(logits: Tensor, softcap: float) -> Tensor:
    """s in at least float32; a new tensor only where it differs from `logits`."""
    s = wide(logits)
    return torch.div(s, softcap).tanh_().mul_(softcap) if softcap else s


def block_loss(s: Tensor, index: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (M,), largest s (M,), lse less that (M,) and p (M, V) of rows `s` with targets in the columns `index`."""
    smoothing = options.label_smoothing
    # 64 x 4096 in float32 take 102 us, exp(s - lse) alone 157 us (EPYC with AVX-512, one thread, 2026-11-20).
    p = torch.softmax(s, -1)
    top = s.amax(-1)
    # The largest element of p is exp(0) / sum(exp(s - top)).
    log_sum = -p.amax(-1).log()
    loss = (top - s.gather(1, index[:, None])[:, 0]) + log_sum
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * ((top - s.mean(-1)) + log_sum)
    if options.z_loss:
        loss = loss + options.z_loss * (top + log_sum).square()
    return loss, top, log_sum, p


def block_dlogits(
    p: Tensor, s: Tensor, index: Tensor, lse: Tensor, scale: Tensor, options: Options
) -> Tensor:
    """Turn p into the gradient of the logits, in place; `scale` (M,) is the gradient of each row's loss."""
    smoothing, column = options.label_smoothing / p.shape[-1], index[:, None]
    # p - 1 at the target is minus the sum of the others: exact even where p is 1 but for a rounding.
    p.scatter_(1, column, 0.0)
    others = p.sum(-1)
    z_term = 2 * options.z_loss * lse
    at_target = (1 - others) * z_term - others + (options.label_smoothing - smoothing)
    p.mul_((scale * (1 + z_term))[:, None])
    if smoothing:
        p.sub_((scale * smoothing)[:, None])
    p.scatter_(1, column, (scale * at_target)[:, None])
    if options.softcap:
        p.addcmul_(p * s, s, value=-(options.softcap**-2))
    ignored = scale == 0
    # Where looking costs no synchronization, a pass is saved; what an ignored row holds, be it NaN, never counts.
    if not can_read_values(ignored) or ignored.any():
        p.masked_fill_(ignored[:, None], 0.0)
    return p


# --- checks of the public functions


def check(
    name: str, label: str, values: Tensor, target: Tensor, options: Options, reduction: str
) -> None:
    """Refuse a target that does not hold one integer for each row of `values`, and options outside their range."""
    if target.shape != values.shape[:-1]:
        raise ValueError(
            f"{name}: target must be {tuple(values.shape[:-1])} to match {label} {tuple(values.shape)}, "
            f"got {tuple(target.shape)}; pass one class index for each row"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: target must be int64 or int32 class indices, got {target.dtype}; cast it"
        )
    if target.device != values.device:
        raise ValueError(
            f"{name}: target must be on {values.device} like {label}, got {target.device}; move it"
        )
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(
            f"{name}: label_smoothing must be at least 0 and below 1, got {options.label_smoothing}"
        )
    if not torch.iinfo(target.dtype).min <= options.ignore_index <= torch.iinfo(target.dtype).max:
        raise ValueError(
            f"{name}: ignore_index must be one that {target.dtype} targets can be, got {options.ignore_index}"
        )
    if not 0 <= options.z_loss <= MOST_OPTION:
        raise ValueError(
            f"{name}: z_loss must be from 0, for none, to {MOST_OPTION}, got {options.z_loss}"
        )
    if options.softcap and not 1 / MOST_OPTION <= options.softcap <= MOST_OPTION:
        raise ValueError(
            f"{name}: softcap must be 0, for none, or from {1 / MOST_OPTION} to {MOST_OPTION}, got {options.softcap}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
