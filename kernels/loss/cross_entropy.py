"""Cross-entropy of logits with integer targets: softcap, label smoothing, z-loss and ignored rows, in any combination.

    s = c tanh(logits / c) with a softcap c, else logits        lse = log sum_v exp(s_v)        p = exp(s - lse)
    forward    l = (1 - eps) (lse - s_t) + eps (lse - mean_v(s)) + z lse^2        loss = sum(l) / count, sum(l) or l
    backward   g = dloss / count, dloss or dl        ds = g (p (1 + 2 z lse) - (1 - eps) [v = t] - eps / V)
               dlogits = ds (1 - (s / c)^2)

Shapes     logits, dlogits: (N, V)   target: (N,)   l: (N,) float32   N = every leading axis, flattened
           statistics: (2, N) float32, each row's largest s and lse less that: apart they keep the digits that lse would lose
           divisor: () int64, count for the mean, else 1
Precision  any float dtype in, dlogits in the same; everything between is float32, and so is the loss
Cost       memory-bound: logits read once forward; read and written as dlogits backward; see cost()
Determinism  rows' losses are added up by one program, in one order
Source     softcap: Gemma Team 2024, arXiv:2408.00118; label smoothing: Szegedy et al. 2016, arXiv:1512.00567;
           z-loss: Chowdhery et al. 2022, arXiv:2204.02311; the block formulas are in _cross_entropy.py, the kernels, which
           linear_cross_entropy shares, in _cross_entropy_kernels.py
"""

import torch
from torch import Tensor

from ..core.layout import as_rows
from ..core.op import define_op, public
from ._launch import launch_reduce, launch_rows_bwd, launch_rows_fwd
from ._rows import (
    BLOCK_ELEMENTS,
    Options,
    block_dlogits,
    block_loss,
    blocks,
    capped,
    check,
    check_targets,
    empty_gradient,
    reduced,
    row_weights,
    weighted,
)

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def plan(N: int, V: int) -> int:
    """Choose how many of N rows of V logits the reference works on at a time."""
    return max(1, min(N, BLOCK_ELEMENTS // V))


def reference_fwd(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, statistics and divisor."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    V = logits.shape[-1]
    check_targets("cross_entropy", target, V, ignore_index)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    index, weight = row_weights(target, V, ignore_index, dtype)
    loss, statistics = torch.empty_like(weight), weight.new_empty(2, weight.shape[0])
    for rows in blocks(logits, plan, V):
        s = capped(logits[rows], softcap)
        loss[rows], statistics[0, rows], statistics[1, rows], _ = block_loss(
            s, index[rows], options
        )
    loss, divisor = reduced(loss, weight, reduction)
    return loss, statistics, divisor


def reference_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, divisor: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits, in their dtype, for that of each row's loss, (N,), or of what they were reduced to."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    V = logits.shape[-1]
    index, weight = row_weights(target, V, ignore_index, statistics.dtype)
    scale, lse = weighted(dloss / divisor, weight), statistics.sum(0)
    dlogits = empty_gradient(logits)
    for rows in blocks(logits, plan, V):
        s = capped(logits[rows], softcap)
        dlogits[rows] = block_dlogits(
            torch.softmax(s, -1), s, index[rows], lse[rows], scale[rows], options
        )
    return dlogits


def shapes_fwd(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `reference_fwd` returns."""
    N, dtype = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty(N if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty((2, N), dtype=dtype), logits.new_empty((), dtype=torch.int64)


def shapes_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, divisor: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Allocate what `reference_bwd` returns."""
    return empty_gradient(logits)


# --- launchers: allocate, plan, launch by keyword


def launch_fwd(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    loss, statistics, _ = shapes_fwd(logits, target, *options, "none")
    launch_rows_fwd(logits, target, options, loss, statistics)
    loss, divisor = launch_reduce(loss, target, ignore_index, reduction)
    return loss, statistics, divisor


def launch_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, divisor: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Kernel counterpart of `reference_bwd`."""
    dlogits = empty_gradient(logits)
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    launch_rows_bwd(dloss, logits, target, statistics, divisor, options, dlogits)
    return dlogits


def cost(N: int, V: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move, forward and backward, and FLOPs (about), for N rows of V logits of `itemsize` bytes."""
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
    logits, target, *options, _ = inputs
    _, statistics, divisor = output
    ctx.options = options
    # Nobody differentiates the statistics: no zeros for their gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, statistics, divisor)


def _grad(ctx, dloss, _dstatistics, _ddivisor):
    return None if dloss is None else _bwd(dloss, *ctx.saved_tensors, *ctx.options), *[None] * 6


_fwd.register_autograd(_grad, setup_context=_save)


@public
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Measure how little probability the softmax of each vector of logits gives to its target, in nats.

    Args:
        logits: (..., V), float32, bfloat16 or float16 (float64 on the CPU too), any layout; left as they were.
        target: logits.shape[:-1], int64 or int32, device of logits: column indices, or ignore_index.
        ignore_index: rows with this target have no loss and no gradient, and "mean" does not count them.
        label_smoothing: share of the target's weight that is spread over all columns, in [0, 1).
        z_loss: weight of the squared log-sum-exp, which keeps logits near normalized.
        softcap: bound c of c tanh(logits / c), which replaces the logits; 0 for none.
        reduction: "mean" over the counted rows, "sum", or "none". To torch.compile all options are constants: it compiles anew
            for another value.
    Returns: () or, with reduction "none", the shape of target; float32 (float64 for float64 logits). Where every row is
        ignored, or there is none, the mean is 0 with zero gradients, not the NaN that PyTorch gives.
    Raises: ValueError if target does not match logits or an option is out of range. A target that is neither a column nor
        ignore_index is an IndexError on the CPU; elsewhere its row's loss and gradient are NaN.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    if logits.ndim == 0 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"cross_entropy: logits must be floating point (..., V) with V at least 1, got {logits.dtype} {tuple(logits.shape)}"
        )
    check("cross_entropy", "logits", logits, target, options, reduction)
    loss, _, _ = _fwd(as_rows(logits), target.reshape(-1).contiguous(), *options, reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss
