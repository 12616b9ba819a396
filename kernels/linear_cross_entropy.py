"""Cross-entropy of a linear layer's outputs, the logits x w^T + b, of which only a few rows ever exist at a time.

    forward    a chunk of rows after the other: logits = x w^T + b, their loss l, and while they are in cache their gradients
               dlogits = dl/dlogits    dx = dlogits w    dw += dlogits^T x    db += sum_n dlogits
    backward   dx, dw and db times the incoming gradient (over count for the mean). With reduction "none" each row has its own,
               known only now: the chunks are computed again.

Shapes     x, dx: (N, D)   w, dw: (V, D)   b, db: (V,)   target: (N,)   l: (N,) float32   N = every leading axis, flattened
Precision  any float dtype in, gradients in the same; the reference multiplies in float32, of which 16-bit inputs get copies.
           Between forward and backward dx, dw and db are float32 and unscaled: they are rounded once, whatever the scale
Cost       compute-bound: 2 N V D FLOPs for the loss, 4 N V D more for the gradients; see cost()
Source     row losses and options as in cross_entropy (_cross_entropy.py); chunks with gradients in the forward:
           Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989
"""

import torch
import torch.nn.functional as F
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
from ._layout import as_rows, wide
from ._op import autocast, define_op

# Below this many rows reading and writing dw, once a chunk, takes longer than its products (V = 50,304: 20 rows 1.4 x slower).
MIN_CHUNK_ROWS = 256


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def plan(N: int, V: int) -> int:
    """Choose how many of N rows of V logits a chunk holds."""
    return max(1, min(N, max(MIN_CHUNK_ROWS, BLOCK_ELEMENTS // V)))


def reference_fwd(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, how many rows were counted, and the gradients of the sum of all losses; empty if not wanted.

    `want_dw` is for weight and bias.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    V = weight.shape[0]
    refuse_bad_targets("linear_cross_entropy", target, V, ignore_index)
    index, row_weight = row_weights(target, V, ignore_index, torch.promote_types(x.dtype, torch.float32))
    loss, *grads = _walk(x, weight, bias, index, row_weight, options, want_dx, want_dw)
    return *reduced(loss, row_weight, reduction), *grads


def reference_scale(
    dloss: Tensor, count: Tensor, dx: Tensor, dw: Tensor, db: Tensor, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias in `dtype`, from those that the forward formed."""
    scale = expanded(dloss, count, reduction)
    return (dx * scale).to(dtype), (dw * scale).to(dtype), (db * scale).to(dtype)


def reference_rows_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias for an incoming gradient of each row, computing the chunks again."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    index, row_weight = row_weights(target, weight.shape[0], ignore_index, dloss.dtype)
    _, *grads = _walk(x, weight, bias, index, weighted(dloss, row_weight), options, want_dx, want_dw)
    return tuple(grad.to(x.dtype) for grad in grads)


def _walk(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, scale: Tensor, options: Options, want_dx: bool, want_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each row's loss and the gradients of sum_n scale_n l_n, in at least float32; empty if not wanted."""
    V, want_db = weight.shape[0], want_dw and bias is not None
    loss = torch.empty_like(scale)
    dx = scale.new_empty(x.shape if want_dx else 0)
    dw = scale.new_zeros(weight.shape if want_dw else 0)
    db = scale.new_zeros(V if want_db else 0)
    wide_weight, wide_bias = wide(weight), None if bias is None else wide(bias)
    for rows in blocks(x, plan, V):
        wide_x = wide(x[rows])
        s = capped(F.linear(wide_x, wide_weight, wide_bias), options.softcap)
        loss[rows], lse, p = block_loss(s, index[rows], options)
        if not (want_dx or want_dw):
            continue
        dlogits = block_dlogits(p, s, index[rows], lse, scale[rows], options)
        if want_dx:
            torch.mm(dlogits, wide_weight, out=dx[rows])
        if want_dw:
            dw.addmm_(dlogits.t(), wide_x)
        if want_db:
            db += dlogits.sum(0)
    return loss, dx, dw, db


def cost(N: int, D: int, V: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move and FLOPs of the products, for the loss alone and with all gradients; `itemsize` bytes an element.

    "bwd" is what forming the gradients adds, whether the forward does it or the backward.
    """
    inputs = (N * D + V * D) * itemsize
    return {"fwd_bytes": inputs, "bwd_bytes": inputs, "fwd_flops": 2 * N * V * D, "bwd_flops": 4 * N * V * D}


# --- operator

_fwd = define_op("linear_cross_entropy_fwd", launch=None, reference=reference_fwd)
_scale = define_op("linear_cross_entropy_scale", launch=None, reference=reference_scale)
_rows_bwd = define_op("linear_cross_entropy_rows_bwd", launch=None, reference=reference_rows_bwd)


def _save(ctx, inputs, output):
    x, weight, target, bias, *options, ctx.reduction, _, _ = inputs
    _, count, *grads = output
    ctx.dtype, ctx.options = x.dtype, options
    # The gradients formed in the forward are outputs that nobody differentiates: no zeros for theirs.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((x, weight, target, bias) if ctx.reduction == "none" else (count, *grads)))


def _grad(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 11
    needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    if ctx.reduction == "none":
        dx, dw, db = _rows_bwd(dloss, *ctx.saved_tensors, *ctx.options, needs_x, needs_weight or needs_bias)
    else:
        dx, dw, db = _scale(dloss, *ctx.saved_tensors, ctx.reduction, ctx.dtype)
    return dx if needs_x else None, dw if needs_weight else None, None, db if needs_bias else None, *[None] * 7


_fwd.register_autograd(_grad, setup_context=_save)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: x must be floating point (..., D) with D at least 1, got {x.dtype} {tuple(x.shape)}"
        )
    D = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != D:
        raise ValueError(
            f"linear_cross_entropy: weight must be (V, {D}) with V at least 1 to match x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}; pass it as nn.Linear stores it"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias must be ({weight.shape[0]},) to match weight {tuple(weight.shape)}, "
            f"got {tuple(bias.shape)}"
        )
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.device != x.device or tensor.dtype != x.dtype):
            raise ValueError(
                f"linear_cross_entropy: {label} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}; "
                "convert it, or use torch.autocast"
            )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Measure the cross-entropy of the logits x @ weight.T + bias without ever holding them all.

    Where an input needs a gradient, the forward forms it too, so the backward is only a scaling; with reduction "none" the
    backward computes the logits again.

    Args:
        x: (..., D), float32, bfloat16 or float16 (float64 on the CPU too), any layout.
        weight: (V, D), as nn.Linear stores it, dtype and device of x; under torch.autocast all three are cast.
        target: x.shape[:-1], int64 or int32, device of x: rows of weight, or ignore_index.
        bias: (V,), dtype and device of x, or None.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as for cross_entropy.
    Returns: () or, with reduction "none", the shape of target; float32 (float64 for float64 x). Where every row is ignored,
        or there is none, the mean is 0 with zero gradients.
    Raises: ValueError if shapes, dtypes or devices do not match or an option is out of range. A target that is neither a
        row of weight nor ignore_index is an IndexError on the CPU; elsewhere the loss is NaN.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, bias)
    check("linear_cross_entropy", "x", x, target, options, reduction)
    forms_gradients = torch.is_grad_enabled() and reduction != "none"
    loss, *_ = _fwd(
        as_rows(x), weight, target.reshape(-1).contiguous(), bias, *options, reduction,
        want_dx=forms_gradients and x.requires_grad,
        want_dw=forms_gradients and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )  # fmt: skip
    return loss.reshape(target.shape) if reduction == "none" else loss
