"""Cross-entropy of the outputs of a linear layer, without storing all of its logits x w^T + b.

    forward    for each chunk of rows: logits = x w^T + b and the row losses l; with gradients also
               dlogits = dl/dlogits    dx = dlogits w    dw += dlogits^T x    db += sum_n dlogits
    backward   multiply dx, dw and db by dloss (for the mean: dloss / count). With reduction "none"
               each row has its own dloss: the backward computes the chunks again.

Shapes     x, dx: (N, D)   w, dw: (V, D)   b, db: (V,)   target: (N,)   l: (N,) float32
           N = all leading axes, flattened
Precision  any float dtype in; gradients in the same dtype. Between forward and backward dx, dw and
           db are float32 and unscaled, so that they are rounded once, after the scaling. The
           reference computes matmuls in float32, from float32 copies of 16-bit operands.
Chunks     The kernels take CHUNK_ROWS rows at a time. With so many rows the matmuls run at full
           speed, and take much longer than reading and writing dw once per chunk. A chunk of logits
           is the only large buffer. The reference takes BLOCK_ELEMENTS logits at a time, which stay
           in a CPU's cache. On AMD no GEMM of 16-bit operands has a float32 result: matmul_out
           makes float32 copies of a chunk and of the weight.
Cost       compute-bound: 2 N V D FLOPs for the loss, 4 N V D more for the gradients; see cost()
Files      block_loss.py, _kernels.py and launch.py are shared with cross_entropy. One kernel
           overwrites a chunk of logits with its gradient. Matmuls are PyTorch's (cuBLAS).
Source     chunks with gradients in the forward: Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.layout import as_rows, wide
from ..core.matmul import autocast, matmul_out
from ..core.op import define_op, keep_needed, public
from ..core.triton import cdiv
from ._checks import check_linear, check_target, check_target_values
from .block_loss import (
    BLOCK_ELEMENTS,
    apply_weights,
    block_dlogits,
    block_loss,
    cap_logits,
    reduce_losses,
    row_blocks,
    row_weights,
)
from .launch import launch_reduce, launch_rows_fwd, launch_rows_fwd_bwd, launch_scale
from .options import LossOptions

# With fewer rows per block, reading and writing dw for each block takes longer than the matmuls
# (V = 50,304: blocks of 20 rows are 1.4 x slower).
MIN_BLOCK_ROWS = 256
# Rows per chunk on a GPU; more if V is small. Estimates for V = 50,304 and D = 768 in bfloat16 on
# an H200: matmuls 1.3 ms, reading and writing dw 0.07 ms, 412 MB of logits.
CHUNK_ROWS, MIN_CHUNK_ELEMENTS = 4_096, 1 << 26
# All chunks but the last have a multiple of this many rows, which fills the tiles of their matmuls.
ROWS_MULTIPLE = 128
# Rows of logits start at multiples of this many elements: GEMMs need it to run at full speed.
LOGITS_MULTIPLE = 64


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def block_rows(N: int, V: int) -> int:
    """Choose how many of N rows of V logits the reference takes at a time."""
    return max(1, min(N, max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // V)))


def reference_fwd(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, its divisor, and dx, dw and db of the sum of all row losses.

    Gradients that are not wanted are empty; `want_dw` asks for dw and db.
    """
    V = weight.shape[0]
    check_target_values("linear_cross_entropy", target, V, options.ignore_index)
    dtype = torch.promote_types(x.dtype, torch.float32)
    index, row_weight = row_weights(target, V, options.ignore_index, dtype)
    loss, *grads = _reference_blocks(x, weight, bias, index, row_weight, options, want_dx, want_dw)
    return *reduce_losses(loss, row_weight, options.reduction), *grads


def reference_scale(
    dloss: Tensor, divisor: Tensor, dx: Tensor, dw: Tensor, db: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply the gradients of the forward by dloss / divisor, and convert them to `dtype`."""
    scale = dloss / divisor
    return (dx * scale).to(dtype), (dw * scale).to(dtype), (db * scale).to(dtype)


def reference_rows_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dw and db for dloss (N,), computing the logits again."""
    index, row_weight = row_weights(target, weight.shape[0], options.ignore_index, dloss.dtype)
    scale = apply_weights(dloss, row_weight)
    _, *grads = _reference_blocks(x, weight, bias, index, scale, options, want_dx, want_dw)
    return tuple(grad.to(x.dtype) for grad in grads)


def _reference_blocks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    options: LossOptions,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the row losses and the gradients of sum_n scale_n l_n, in float32 or wider."""
    N, V = x.shape[0], weight.shape[0]
    loss = torch.empty_like(scale)
    dx, dw, db = _empty_gradients(x, weight, bias, want_dx, want_dw, scale.dtype)
    dw.zero_()
    db.zero_()
    wide_weight = wide(weight)
    wide_bias = None if bias is None else wide(bias)
    for rows in row_blocks(N, block_rows(N, V)):
        # the loss of the block
        wide_x = wide(x[rows])
        s = cap_logits(F.linear(wide_x, wide_weight, wide_bias), options.softcap)
        loss[rows], top, log_sum, p = block_loss(s, index[rows], options)
        if not (want_dx or want_dw):
            continue
        # its gradients
        dlogits = block_dlogits(p, s, index[rows], top + log_sum, scale[rows], options)
        if want_dx:
            torch.mm(dlogits, wide_weight, out=dx[rows])
        if want_dw:
            dw.addmm_(dlogits.t(), wide_x)
        if db.numel():
            db += dlogits.sum(0)
    return loss, dx, dw, db


def shapes_fwd(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the outputs of `reference_fwd`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(x.shape[0] if options.reduction == "none" else (), dtype=dtype)
    divisor = x.new_empty((), dtype=torch.int64)
    return loss, divisor, *_empty_gradients(x, weight, bias, want_dx, want_dw, dtype)


def shapes_rows_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the outputs of `reference_rows_bwd`."""
    return _empty_gradients(x, weight, bias, want_dx, want_dw, x.dtype)


def _empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, want_dx: bool, want_dw: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    want_db = want_dw and bias is not None
    return (
        x.new_empty(x.shape if want_dx else 0, dtype=dtype),
        x.new_empty(weight.shape if want_dw else 0, dtype=dtype),
        x.new_empty(weight.shape[0] if want_db else 0, dtype=dtype),
    )


# --- launchers: allocate, plan, launch by keyword


def plan(N: int, V: int) -> int:
    """Choose the rows per chunk for N rows of V logits. All chunks have about the same size."""
    N = max(N, 1)
    min_elements_rows = MIN_CHUNK_ELEMENTS // _row_stride(V) // ROWS_MULTIPLE * ROWS_MULTIPLE
    chunks = cdiv(N, max(CHUNK_ROWS, min_elements_rows))
    return cdiv(cdiv(N, chunks), ROWS_MULTIPLE) * ROWS_MULTIPLE


def _row_stride(V: int) -> int:
    """Elements between the starts of two rows in a chunk of logits."""
    return cdiv(V, LOGITS_MULTIPLE) * LOGITS_MULTIPLE


def launch_fwd(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    loss, *grads = _launch_chunks(x, weight, target, bias, None, options, want_dx, want_dw)
    return *launch_reduce(loss, target, options), *grads


def launch_rows_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_rows_bwd`."""
    _, *grads = _launch_chunks(x, weight, target, bias, dloss, options, want_dx, want_dw)
    return tuple(grad.to(x.dtype) for grad in grads)


def _launch_chunks(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    dloss: Tensor | None,
    options: LossOptions,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the row losses, and float32 gradients of sum_n dloss_n l_n. Default of dloss: ones."""
    N, V = x.shape[0], weight.shape[0]
    loss = x.new_empty(N, dtype=torch.float32)
    dx, dw, db = _empty_gradients(x, weight, bias, want_dx, want_dw, torch.float32)
    db.zero_()
    if N == 0:
        dw.zero_()  # otherwise the first chunk overwrites dw
    rows = plan(N, V)
    buffer = x.new_empty(min(rows, N), _row_stride(V))
    for chunk in row_blocks(N, rows):
        # logits
        logits = buffer[: chunk.stop - chunk.start, :V]
        if bias is None:
            torch.mm(x[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[chunk], weight.t(), out=logits)

        # losses, and dlogits over the logits
        if not (want_dx or want_dw):
            launch_rows_fwd(logits, target[chunk], options, loss[chunk], None)
            continue
        dloss_chunk = None if dloss is None else dloss[chunk]
        launch_rows_fwd_bwd(logits, target[chunk], dloss_chunk, options, loss[chunk])
        dlogits = logits

        # gradients of x, weight and bias
        if want_dx:
            matmul_out(dlogits, weight, dx[chunk])
        if want_dw:
            matmul_out(dlogits.t(), x[chunk], dw, accumulate=chunk.start > 0)
        if db.numel():
            db += dlogits.sum(0, dtype=torch.float32)
    return loss, dx, dw, db


def cost(N: int, D: int, V: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move, FLOPs of the matmuls, and memory, with `itemsize` bytes per element.

    "fwd" is the loss alone. "bwd" is the additional cost of the gradients, which the forward
    computes unless the reduction is "none". "workspace_bytes" is temporary memory of the kernels:
    a chunk of logits. "saved_bytes" is memory kept between forward and backward: gradients in
    float32. Both leave out a few numbers per row.
    """
    inputs = (N * D + V * D) * itemsize
    return {
        "fwd_bytes": inputs,
        "bwd_bytes": inputs,
        "fwd_flops": 2 * N * V * D,
        "bwd_flops": 4 * N * V * D,
        "workspace_bytes": min(plan(N, V), N) * _row_stride(V) * itemsize,
        "saved_bytes": 4 * D * (N + V),
    }


# --- operator

_fwd = define_op(
    "linear_cross_entropy_fwd", launch=launch_fwd, reference=reference_fwd, shapes=shapes_fwd
)
_scale = define_op("linear_cross_entropy_scale", launch=launch_scale, reference=reference_scale)
_rows_bwd = define_op(
    "linear_cross_entropy_rows_bwd",
    launch=launch_rows_bwd,
    reference=reference_rows_bwd,
    shapes=shapes_rows_bwd,
)


def _save(ctx, inputs, output):
    x, weight, target, bias, ctx.options, _, _ = inputs
    _, divisor, *grads = output
    ctx.dtype = x.dtype
    # Do not allocate zeros for the gradients of the outputs dx, dw and db: nobody uses them.
    ctx.set_materialize_grads(False)
    if ctx.options.reduction == "none":
        ctx.save_for_backward(x, weight, target, bias)
    else:
        ctx.save_for_backward(divisor, *grads)


def _grad(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 7
    needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    if ctx.options.reduction == "none":
        want_dw = needs_weight or needs_bias
        grads = _rows_bwd(dloss, *ctx.saved_tensors, ctx.options, needs_x, want_dw)
    else:
        grads = _scale(dloss, *ctx.saved_tensors, ctx.dtype)
    dx, dw, db = keep_needed(grads, (needs_x, needs_weight, needs_bias))
    return dx, dw, None, db, None, None, None


_fwd.register_autograd(_grad, setup_context=_save)


@public
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
    """Compute the cross-entropy of the logits x @ weight.T + bias without storing all of them.

    If an input needs a gradient, the forward computes it and the backward only scales it. With
    reduction "none" the backward computes the logits again.

    Args:
        x: (..., D), float32, bfloat16 or float16 (on the CPU also float64), any layout.
        weight: (V, D), as nn.Linear stores it, dtype and device of x. torch.autocast casts x,
            weight and bias.
        target: x.shape[:-1], int64 or int32, device of x. Rows of weight or ignore_index.
        bias: (V,), dtype and device of x, or None.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as for cross_entropy.
    Returns: () or, with reduction "none", the shape of target; float32 (float64 for float64 x). If
        there are no rows, or all are ignored, the mean and its gradients are 0.
    Raises: ValueError if shapes, dtypes or devices do not match or an option is out of range.
        IndexError on the CPU for a target that is neither a row of weight nor ignore_index; on
        other devices the loss is NaN. TypeError for float64 on a GPU.
    """
    options = LossOptions(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
    )
    x, weight, bias = autocast(x, weight, bias)
    check_linear("linear_cross_entropy", x, weight, bias)
    check_target("linear_cross_entropy", "x", x, target, ignore_index)
    options.check("linear_cross_entropy")
    compute_gradients = torch.is_grad_enabled() and reduction != "none"
    want_dx = compute_gradients and x.requires_grad
    want_dw = compute_gradients and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    target_rows = target.reshape(-1).contiguous()
    loss, *_ = _fwd(as_rows(x), weight, target_rows, bias, options, want_dx, want_dw)
    return loss.reshape(target.shape) if reduction == "none" else loss
