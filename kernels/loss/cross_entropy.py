"""Cross-entropy of logits with integer targets.

Softcap, label smoothing, z-loss and ignored rows can be combined.

               s = c tanh(logits / c) with a softcap c, else logits
               lse = log sum_v exp(s_v)    p = exp(s - lse)
    forward    l = (1 - eps) (lse - s_t) + eps (lse - mean_v(s)) + z lse^2
               loss = sum(l) / count (mean), sum(l) (sum) or l (none)
    backward   g = dloss / count (mean) or dloss (sum, none)
               ds = g (p (1 + 2 z lse) - (1 - eps) [v = t] - eps / V)
               dlogits = ds (1 - (s / c)^2)

Shapes     logits, dlogits: (N, V)   target: (N,)   l: (N,) float32
           N = all leading axes, flattened
           statistics: (2, N) float32, top = max_v s_v and log_sum = lse - top of each row. The pair
           keeps digits that the sum lse would lose.
           divisor: () int64, count for the mean, else 1
           correct: (N,) bool, whether no other column is above the target; empty if not wanted
Precision  any float dtype in; dlogits in the same dtype; float32 in between, and for the loss
Cost       memory-bound: the forward reads the logits once; the backward reads them and writes
           dlogits; see cost()
Order      one program sums the losses of all rows, always in the same order
Files      block_loss.py: the formulas for a block of rows; _kernels.py and launch.py: the kernels.
           linear_cross_entropy uses both.
Source     softcap: Gemma Team 2024, arXiv:2408.00118; label smoothing: Szegedy et al. 2016,
           arXiv:1512.00567; z-loss: Chowdhery et al. 2022, arXiv:2204.02311
"""

import torch
from torch import Tensor

from ..core.layout import as_rows
from ..core.op import define_op, public
from ._checks import check_target, check_target_values
from .block_loss import (
    apply_weights,
    block_dlogits,
    block_loss,
    cap_logits,
    is_correct,
    reduce_losses,
    results,
    row_blocks,
    row_weights,
)
from .chunks import block_rows
from .launch import empty_gradient, launch_reduce, launch_rows_bwd, launch_rows_fwd
from .options import LossOptions

# 4 MB in float32: such a block and the results computed from it stay in a CPU's cache. Smaller
# blocks only add calls.
BLOCK_ELEMENTS = 1 << 20

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    logits: Tensor, target: Tensor, options: LossOptions, want_correct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, statistics, divisor and correct."""
    N, V = logits.shape
    check_target_values("cross_entropy", target, V, options.ignore_index)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    index, weight = row_weights(target, V, options.ignore_index, dtype)
    loss = torch.empty_like(weight)
    statistics = weight.new_empty(2, N)
    correct = empty_correct(logits, want_correct)
    for rows in row_blocks(N, block_rows(N, V, BLOCK_ELEMENTS, 1)):
        s = cap_logits(logits[rows], options.softcap)
        loss[rows], top, statistics[1, rows], _ = block_loss(s, index[rows], options)
        statistics[0, rows] = top
        if want_correct:
            correct[rows] = is_correct(s, index[rows], weight[rows], top)
    loss, divisor = reduce_losses(loss, weight, options.reduction)
    return loss, statistics, divisor, correct


def reference_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    divisor: Tensor,
    options: LossOptions,
) -> Tensor:
    """Return dlogits, in the dtype of the logits, for dloss of shape () or (N,)."""
    N, V = logits.shape
    index, weight = row_weights(target, V, options.ignore_index, statistics.dtype)
    scale = apply_weights(dloss / divisor, weight)
    lse = statistics.sum(0)
    dlogits = empty_gradient(logits)
    for rows in row_blocks(N, block_rows(N, V, BLOCK_ELEMENTS, 1)):
        s = cap_logits(logits[rows], options.softcap)
        dlogits[rows] = block_dlogits(
            torch.softmax(s, -1), s, index[rows], lse[rows], scale[rows], options
        )
    return dlogits


def shapes_fwd(
    logits: Tensor, target: Tensor, options: LossOptions, want_correct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the outputs of `reference_fwd`."""
    N = logits.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty(N if options.reduction == "none" else (), dtype=dtype)
    statistics = logits.new_empty((2, N), dtype=dtype)
    divisor = logits.new_empty((), dtype=torch.int64)
    return loss, statistics, divisor, empty_correct(logits, want_correct)


def empty_correct(logits: Tensor, want_correct: bool) -> Tensor:
    """Allocate `correct` for logits (N, V)."""
    return logits.new_empty(logits.shape[0] if want_correct else 0, dtype=torch.bool)


def shapes_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    divisor: Tensor,
    options: LossOptions,
) -> Tensor:
    """Allocate the outputs of `reference_bwd`."""
    return empty_gradient(logits)


# --- launchers: allocate, plan, launch by keyword


def launch_fwd(
    logits: Tensor, target: Tensor, options: LossOptions, want_correct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    N = logits.shape[0]
    rows = logits.new_empty(N, dtype=torch.float32)
    statistics = logits.new_empty((2, N), dtype=torch.float32)
    correct = empty_correct(logits, want_correct)
    launch_rows_fwd(logits, target, options, rows, statistics, correct if want_correct else None)
    loss, divisor = launch_reduce(rows, target, options)
    return loss, statistics, divisor, correct


def launch_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    divisor: Tensor,
    options: LossOptions,
) -> Tensor:
    """Kernel counterpart of `reference_bwd`."""
    dlogits = empty_gradient(logits)
    launch_rows_bwd(dloss, logits, target, statistics, divisor, options, dlogits)
    return dlogits


def cost(N: int, V: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move, and FLOPs (approximate), for N rows of V logits of `itemsize` bytes."""
    elements = N * V
    return {
        "fwd_bytes": elements * itemsize,
        "bwd_bytes": 2 * elements * itemsize,
        "fwd_flops": 4 * elements,
        "bwd_flops": 5 * elements,
    }


# --- operator

_fwd = define_op("cross_entropy_fwd", launch=launch_fwd, reference=reference_fwd, shapes=shapes_fwd)
_bwd = define_op("cross_entropy_bwd", launch=launch_bwd, reference=reference_bwd, shapes=shapes_bwd)


def _save(ctx, inputs, output):
    logits, target, ctx.options, _ = inputs
    _, statistics, divisor, _ = output
    # Do not allocate zeros for the gradient of the statistics: nobody uses it.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, statistics, divisor)


def _grad(ctx, dloss, *_):
    dlogits = None if dloss is None else _bwd(dloss, *ctx.saved_tensors, ctx.options)
    return dlogits, None, None, None


_fwd.register_autograd(_grad, setup_context=_save)


@public
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute the cross-entropy, in nats, between the softmax of the logits and the targets.

    torch.compile treats the options as constants: a new value compiles again.

    Args:
        logits: (..., V), float32, bfloat16 or float16 (on the CPU also float64), any layout. The
            logits are not modified.
        target: logits.shape[:-1], int64 or int32, device of logits: column indices or ignore_index.
        ignore_index: rows with this target have no loss and no gradient, and do not count for the
            mean.
        label_smoothing: fraction of each target's weight that is spread evenly over all columns, in
            [0, 1].
        z_loss: weight of the squared log-sum-exp, which keeps it close to 0.
        softcap: bound c: logits are replaced by c tanh(logits / c). 0 or None: no bound.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        return_lse: also return the log-sum-exp of each row's logits, after the softcap.
        return_correct: also return in how many rows no logit is above the target's.
    Returns: loss; or a tuple of loss, lse and correct, without those that were not asked for.
        loss: () or, with reduction "none", the shape of target; float32 (float64 for float64
            logits). If there are no rows, or all are ignored, the mean and its gradients are 0,
            while PyTorch gives NaN.
        lse: shape of target, dtype of loss, 0 in ignored rows. It has no gradient.
        correct: () int64. Ignored rows do not count.
    Raises: ValueError if target does not match logits or an option is out of range. IndexError on
        the CPU for a target that is neither a column nor ignore_index; on other devices its row's
        loss and gradient are NaN. TypeError for float64 on a GPU.
    """
    options = LossOptions(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap or 0.0,
        reduction=reduction,
    )
    if logits.ndim == 0 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise ValueError(
            "cross_entropy: logits must be floating point (..., V) with V at least 1, "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )
    check_target("cross_entropy", "logits", logits, target, ignore_index)
    options.check("cross_entropy")
    target_rows = target.reshape(-1).contiguous()
    loss, statistics, _, correct = _fwd(as_rows(logits), target_rows, options, return_correct)
    lse = statistics.sum(0) if return_lse else None
    correct = correct if return_correct else None
    return results(loss, lse, correct, target, logits.shape[-1], options)
