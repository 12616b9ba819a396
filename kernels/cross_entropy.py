"""Cross-entropy of logits with integer targets: softcap, label smoothing, z-loss and ignored rows, in any combination.

    s = c tanh(logits / c) with a softcap c, else logits        lse = log sum_v exp(s_v)        p = exp(s - lse)
    forward    l = (1 - eps) (lse - s_t) + eps (lse - mean_v(s)) + z lse^2        loss = sum(l) / count, sum(l) or l
    backward   g = dloss / count, dloss or dl        ds = g (p (1 + 2 z lse) - (1 - eps) [v = t] - eps / V)
               dlogits = ds (1 - (s / c)^2)

Shapes     logits, dlogits: (N, V)   target: (N,)   l, lse: (N,) float32   count: () int64     N = leading axes, flattened
Precision  any float dtype in, dlogits in the same; everything between is float32, and so is the loss
Cost       memory-bound: logits read once forward; read and written as dlogits backward; see cost()
Source     softcap: Gemma Team 2024, arXiv:2408.00118; label smoothing: Szegedy et al. 2016, arXiv:1512.00567;
           z-loss: Chowdhery et al. 2022, arXiv:2204.02311; the block formulas are in _cross_entropy.py
"""

import torch
from torch import Tensor

from ._cross_entropy import (
    BLOCK_ELEMENTS,
    Options,
    block_dlogits,
    block_loss,
    blocks,
    capped,
    check,
    expanded,
    reduced,
    refuse_bad_targets,
    row_weights,
    weighted,
)
from ._layout import as_rows
from ._op import define_op

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def plan(N: int, V: int) -> int:
    """Choose how many of N rows of V logits the reference works on at a time."""
    return max(1, min(N, BLOCK_ELEMENTS // V))


def reference_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, lse of each row, and how many rows were counted."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    V = logits.shape[-1]
    refuse_bad_targets("cross_entropy", target, V, ignore_index)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    index, weight = row_weights(target, V, ignore_index, dtype)
    loss, lse = torch.empty_like(weight), torch.empty_like(weight)
    for rows in blocks(logits, plan, V):
        s = capped(logits[rows], softcap)
        loss[rows], lse[rows], _ = block_loss(s, index[rows], options)
    loss, count = reduced(loss, weight, reduction)
    return loss, lse, count


def reference_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, count: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits, in their dtype."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    V = logits.shape[-1]
    index, weight = row_weights(target, V, ignore_index, lse.dtype)
    scale = weighted(expanded(dloss, count, reduction), weight)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in blocks(logits, plan, V):
        s = capped(logits[rows], softcap)
        dlogits[rows] = block_dlogits(torch.softmax(s, -1), s, index[rows], lse[rows], scale[rows], options)
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

_fwd = define_op("cross_entropy_fwd", launch=None, reference=reference_fwd)
_bwd = define_op("cross_entropy_bwd", launch=None, reference=reference_bwd)


def _save(ctx, inputs, output):
    logits, target, *ctx.options = inputs
    _, lse, count = output
    ctx.save_for_backward(logits, target, lse, count)


def _grad(ctx, dloss, _dlse, _dcount):
    return _bwd(dloss, *ctx.saved_tensors, *ctx.options), *[None] * 6


_fwd.register_autograd(_grad, setup_context=_save)


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
        reduction: "mean" over the counted rows, "sum", or "none".
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
