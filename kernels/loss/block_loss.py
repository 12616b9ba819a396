"""The loss of a block of rows of logits, and its gradient, in PyTorch.

The references of cross_entropy and linear_cross_entropy go through their rows in such blocks.

               s = c tanh(logits / c) with a softcap c, else logits
               lse = log sum_v exp(s_v)    p = exp(s - lse)
    loss       l = (1 - eps) (lse - s_t) + eps (lse - mean_v(s)) + z lse^2
    gradient   dl/ds = p (1 + 2 z lse) - (1 - eps) [v = t] - eps / V
               dl/dlogits = dl/ds (1 - (s / c)^2)

Shapes     logits, s, p: (M, V)   index (the targets' columns), loss, lse: (M,)
Precision  float32, or float64 for float64 logits
Rows       A row whose target is ignore_index has weight 0: its loss and gradient are 0. A row whose
           target is not a column has weight NaN: its loss and gradient are NaN.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.layout import wide
from ..core.op import can_read_values
from .options import LossOptions

# --- rows


def row_blocks(N: int, rows: int) -> Iterator[slice]:
    """Slices that cover N rows, `rows` at a time; the last one may be shorter."""
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))


def row_weights(
    target: Tensor, V: int, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a column to read in each row, int64, and each row's weight: 1, 0 or NaN."""
    index = target.clamp(0, V - 1)
    weight = torch.ones_like(target, dtype=dtype).masked_fill_(index != target, float("nan"))
    return index.long(), weight.masked_fill_(target == ignore_index, 0.0)


def apply_weights(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply `rows` by their weights. Rows with weight 0 become 0, even from NaN."""
    return (rows * weight).masked_fill_(weight == 0, 0.0)


def is_correct(s: Tensor, index: Tensor, weight: Tensor, top: Tensor) -> Tensor:
    """Return whether no other column is above the target, for rows with weight 1; else False."""
    return (s.gather(1, index[:, None])[:, 0] == top) & (weight == 1)


def reduce_losses(loss: Tensor, weight: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Return the weighted losses, reduced as `reduction` says, and the divisor, () int64.

    The divisor is the number of rows that are not ignored, at least 1, for the mean; else it is 1.
    """
    loss = apply_weights(loss, weight)
    if reduction == "mean":
        divisor = (weight != 0).sum().clamp_(min=1)
        return loss.sum() / divisor, divisor
    divisor = torch.ones((), dtype=torch.int64, device=loss.device)
    return (loss.sum() if reduction == "sum" else loss), divisor


def results(
    loss: Tensor,
    lse: Tensor | None,
    correct: Tensor | None,
    target: Tensor,
    V: int,
    options: LossOptions,
) -> Tensor | tuple[Tensor, ...]:
    """Return what the public functions return: the loss, or a tuple if lse or correct is given.

    lse (N,) becomes 0 in ignored rows and NaN in rows whose target is not a column. correct (N,) is
    summed.
    """
    found = [loss.reshape(target.shape) if options.reduction == "none" else loss]
    if lse is not None:
        _, weight = row_weights(target.reshape(-1), V, options.ignore_index, lse.dtype)
        found.append(apply_weights(lse.detach(), weight).reshape(target.shape))
    if correct is not None:
        found.append(correct.sum())
    return found[0] if len(found) == 1 else tuple(found)


# --- the loss of a block and its gradient


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    """Return s, in float32 or wider. Without a softcap and a cast it is `logits` itself."""
    s = wide(logits)
    return torch.div(s, softcap).tanh_().mul_(softcap) if softcap else s


def block_loss(
    s: Tensor, index: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss (M,), top = max_v s_v (M,), log_sum = lse - top (M,), and p (M, V)."""
    smoothing = options.label_smoothing
    # softmax takes 102 us for 64 x 4096 in float32, exp(s - lse) alone 157 us (AMD EPYC with
    # AVX-512, one thread, November 2026).
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
    p: Tensor, s: Tensor, index: Tensor, lse: Tensor, scale: Tensor, options: LossOptions
) -> Tensor:
    """Overwrite p with the gradient of sum_m scale_m l_m with respect to the logits; return it."""
    smoothing = options.label_smoothing / p.shape[-1]
    column = index[:, None]

    # At the target, compute p - 1 as minus the sum of the other p. It keeps its digits if p rounds
    # to 1.
    p.scatter_(1, column, 0.0)
    others = p.sum(-1)
    factor, at_target = scale, -others
    if options.z_loss:
        z_term = 2 * options.z_loss * lse
        factor = scale * (1 + z_term)
        at_target = (1 - others) * z_term - others

    # gradient of s. On a CPU, skip passes over p that would not change it.
    is_unscaled = can_read_values(factor) and bool((factor == 1).all())
    if not is_unscaled:
        p.mul_(factor[:, None])
    if smoothing:
        p.sub_((scale * smoothing)[:, None])
        at_target = at_target + (options.label_smoothing - smoothing)
    p.scatter_(1, column, (scale * at_target)[:, None])

    # gradient of the logits
    if options.softcap:
        p.addcmul_(p * s, s, value=-(options.softcap**-2))
    if not is_unscaled:
        p.masked_fill_((scale == 0)[:, None], 0.0)  # ignored rows, even from NaN
    return p
