"""Cross-entropy of a linear layer's outputs, the logits x w^T + b, of which only a few rows ever exist at a time.

    forward    a chunk of rows after the other: logits = x w^T + b, their loss l, and while they are in cache their gradients
               dlogits = dl/dlogits    dx = dlogits w    dw += dlogits^T x    db += sum_n dlogits
    backward   dx, dw and db times the incoming gradient (over count for the mean). With reduction "none" each row has its own,
               known only now: the chunks are computed again.

Shapes     x, dx: (N, D)   w, dw: (V, D)   b, db: (V,)   target: (N,)   l: (N,) float32   N = every leading axis, flattened
Precision  any float dtype in, gradients in the same; the reference multiplies in float32, of which 16-bit inputs get copies.
           Between forward and backward dx, dw and db are float32 and unscaled: they are rounded once, whatever the scale
Chunks     the kernels: CHUNK_ROWS, so many that the products of a chunk run at full speed and reading and writing dw once a
           chunk takes little beside them, and that a chunk of logits, the only large buffer, has a bounded size. The reference:
           BLOCK_ELEMENTS, which stay in a CPU's cache. On AMD, where no product of 16 bits is written in 32, the products of a
           chunk take float32 copies of it and of the weight
Cost       compute-bound: 2 N V D FLOPs for the loss, 4 N V D more for the gradients; see cost()
Source     row losses and options as in cross_entropy (_cross_entropy.py), whose kernels write a chunk's gradient over its
           logits; products: PyTorch's (cuBLAS); chunks with gradients in the forward: Hsu et al. 2024 (Liger Kernel),
           arXiv:2410.10989
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.layout import as_rows, wide
from ..core.matmul import autocast, matmul_out
from ..core.op import define_op, public
from ..core.triton import cdiv, tl, triton
from ._launch import launch_reduce, launch_rows_fwd, launch_rows_fwd_bwd
from ._rows import (
    BLOCK_ELEMENTS,
    Options,
    block_dlogits,
    block_loss,
    blocks,
    capped,
    check,
    check_targets,
    reduced,
    row_weights,
    weighted,
)

# Below this many rows reading and writing dw, once a chunk, takes longer than its products (V = 50,304: 20 rows 1.4 x slower).
MIN_BLOCK_ROWS = 256
# Rows of a chunk on a GPU, more where V is small. At V = 50,304 and D = 768 in bfloat16 on an H200, estimates: products 1.3 ms,
# dw read and written 0.07 ms, 412 MB of logits.
CHUNK_ROWS, MIN_CHUNK_ELEMENTS = 4_096, 1 << 26
# Rows of a chunk, but the last, are a multiple of this, which fills the tiles of its products.
ROWS_MULTIPLE = 128
# Rows of logits lie a multiple of this many elements apart: matrix products take no other addresses at full speed.
LOGITS_MULTIPLE = 64
SCALE_BLOCK = 2_048


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def block_rows(N: int, V: int) -> int:
    """Choose how many of N rows of V logits the reference works on at a time."""
    return max(1, min(N, max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // V)))


def reference_fwd(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, what it was divided by, and the gradients of the sum of all losses; empty if not wanted.

    `want_dw` is for weight and bias.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    V = weight.shape[0]
    check_targets("linear_cross_entropy", target, V, ignore_index)
    index, row_weight = row_weights(
        target, V, ignore_index, torch.promote_types(x.dtype, torch.float32)
    )
    loss, *grads = _walk(x, weight, bias, index, row_weight, options, want_dx, want_dw)
    return *reduced(loss, row_weight, reduction), *grads


def reference_scale(
    dloss: Tensor, divisor: Tensor, dx: Tensor, dw: Tensor, db: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias in `dtype`, from those that the forward formed."""
    scale = dloss / divisor
    return (dx * scale).to(dtype), (dw * scale).to(dtype), (db * scale).to(dtype)


def reference_rows_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias for an incoming gradient of each row, computing the chunks again."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    index, row_weight = row_weights(target, weight.shape[0], ignore_index, dloss.dtype)
    _, *grads = _walk(
        x, weight, bias, index, weighted(dloss, row_weight), options, want_dx, want_dw
    )
    return tuple(grad.to(x.dtype) for grad in grads)


def _walk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    options: Options,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each row's loss and the gradients of sum_n scale_n l_n, in at least float32; empty if not wanted."""
    loss = torch.empty_like(scale)
    dx, dw, db = _empty_gradients(x, weight, bias, want_dx, want_dw, scale.dtype)
    dw.zero_()
    db.zero_()
    wide_weight, wide_bias = wide(weight), None if bias is None else wide(bias)
    for rows in blocks(x, block_rows, weight.shape[0]):
        wide_x = wide(x[rows])
        s = capped(F.linear(wide_x, wide_weight, wide_bias), options.softcap)
        loss[rows], top, log_sum, p = block_loss(s, index[rows], options)
        if not (want_dx or want_dw):
            continue
        dlogits = block_dlogits(p, s, index[rows], top + log_sum, scale[rows], options)
        if want_dx:
            torch.mm(dlogits, wide_weight, out=dx[rows])
        if want_dw:
            dw.addmm_(dlogits.t(), wide_x)
        if db.numel():
            db += dlogits.sum(0)
    return loss, dx, dw, db


def shapes_fwd(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate what `reference_fwd` returns."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(x.shape[0] if reduction == "none" else (), dtype=dtype)
    return (
        loss,
        x.new_empty((), dtype=torch.int64),
        *_empty_gradients(x, weight, bias, want_dx, want_dw, dtype),
    )


def shapes_rows_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate what `reference_rows_bwd` returns."""
    return _empty_gradients(x, weight, bias, want_dx, want_dw, x.dtype)


def _empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, want_dx: bool, want_dw: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    want_db = want_dw and bias is not None
    shapes = (
        x.shape if want_dx else 0,
        weight.shape if want_dw else 0,
        weight.shape[0] if want_db else 0,
    )
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


# --- kernels: a program owns a block of elements; those of the logits' rows are cross_entropy's


@triton.jit
def _linear_cross_entropy_scale_kernel(
    grad_ptr, dloss_ptr, divisor_ptr, out_ptr, numel, BLOCK_N: tl.constexpr
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < numel
    scale = tl.load(dloss_ptr).to(tl.float32) / tl.load(divisor_ptr)
    grad = tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0) * scale
    tl.store(out_ptr + offs_n, grad.to(out_ptr.dtype.element_ty), mask=mask_n)


# --- launchers: allocate, plan, launch by keyword


def plan(N: int, V: int) -> int:
    """Choose how many of N rows of V logits a chunk of the kernels holds: about the same for all chunks."""
    most = max(CHUNK_ROWS, MIN_CHUNK_ELEMENTS // _row_elements(V) // ROWS_MULTIPLE * ROWS_MULTIPLE)
    # What remains of the rows is shared out over the same number of chunks.
    rows = cdiv(max(N, 1), cdiv(max(N, 1), most))
    return cdiv(rows, ROWS_MULTIPLE) * ROWS_MULTIPLE


def _row_elements(V: int) -> int:
    return cdiv(V, LOGITS_MULTIPLE) * LOGITS_MULTIPLE


def launch_fwd(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Kernel counterpart of `reference_fwd`."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    loss, *grads = _launch_chunks(x, weight, target, bias, None, options, want_dx, want_dw)
    return *launch_reduce(loss, target, ignore_index, reduction), *grads


def launch_scale(
    dloss: Tensor, divisor: Tensor, dx: Tensor, dw: Tensor, db: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_scale`."""
    scaled = [torch.empty(grad.shape, dtype=dtype, device=grad.device) for grad in (dx, dw, db)]
    for grad, out in zip((dx, dw, db), scaled, strict=True):
        _linear_cross_entropy_scale_kernel[(cdiv(grad.numel(), SCALE_BLOCK),)](
            grad_ptr=grad,
            dloss_ptr=dloss,
            divisor_ptr=divisor,
            out_ptr=out,
            numel=grad.numel(),
            BLOCK_N=SCALE_BLOCK,
        )
    return tuple(scaled)


def launch_rows_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Kernel counterpart of `reference_rows_bwd`."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    _, *grads = _launch_chunks(x, weight, target, bias, dloss, options, want_dx, want_dw)
    return tuple(grad.to(x.dtype) for grad in grads)


def _launch_chunks(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, dloss: Tensor | None, options: Options,
    want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return each row's loss and the float32 gradients of their sum, weighted by `dloss` if given; empty if not wanted."""
    (N, V), loss = (x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], dtype=torch.float32)
    dx, dw, db = _empty_gradients(x, weight, bias, want_dx, want_dw, torch.float32)
    db.zero_()
    if not N:
        # Else the first chunk writes dw, and the others add to it.
        dw.zero_()
    rows = plan(N, V)
    buffer = x.new_empty(min(rows, N), _row_elements(V))
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        logits = buffer[: chunk.stop - start, :V]
        if bias is None:
            torch.mm(x[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[chunk], weight.t(), out=logits)
        if not (want_dx or want_dw):
            launch_rows_fwd(logits, target[chunk], options, loss[chunk], None)
            continue
        launch_rows_fwd_bwd(
            logits, target[chunk], None if dloss is None else dloss[chunk], options, loss[chunk]
        )
        dlogits = logits
        if want_dx:
            matmul_out(dlogits, weight, dx[chunk])
        if want_dw:
            matmul_out(dlogits.t(), x[chunk], dw, accumulate=start > 0)
        if db.numel():
            db += dlogits.sum(0, dtype=torch.float32)
    return loss, dx, dw, db


def cost(N: int, D: int, V: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move and FLOPs of the products, for the loss alone and with all gradients; `itemsize` bytes an element.

    "bwd" is what forming the gradients adds, whether the forward does it or the backward. "workspace_bytes" is what the kernels
    hold for a while beside inputs, gradients and a few numbers a row: a chunk of logits. "saved_bytes" is what they keep
    between forward and backward: gradients in float32.
    """
    inputs = (N * D + V * D) * itemsize
    return {
        "fwd_bytes": inputs,
        "bwd_bytes": inputs,
        "fwd_flops": 2 * N * V * D,
        "bwd_flops": 4 * N * V * D,
        "workspace_bytes": min(plan(N, V), N) * _row_elements(V) * itemsize,
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
    x, weight, target, bias, *options, ctx.reduction, _, _ = inputs
    _, divisor, *grads = output
    ctx.dtype, ctx.options = x.dtype, options
    # The gradients formed in the forward are outputs that nobody differentiates: no zeros for theirs.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *((x, weight, target, bias) if ctx.reduction == "none" else (divisor, *grads))
    )


def _grad(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 11
    needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    if ctx.reduction == "none":
        dx, dw, db = _rows_bwd(
            dloss, *ctx.saved_tensors, *ctx.options, needs_x, needs_weight or needs_bias
        )
    else:
        dx, dw, db = _scale(dloss, *ctx.saved_tensors, ctx.dtype)
    return (
        dx if needs_x else None,
        dw if needs_weight else None,
        None,
        db if needs_bias else None,
        *[None] * 7,
    )


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
    """Measure the cross-entropy of the logits x @ weight.T + bias without ever holding them all.

    Where an input needs a gradient, the forward forms it too, so the backward is only a scaling; with reduction "none" the
    backward computes the logits again.

    Args:
        x: (..., D), float32, bfloat16 or float16 (float64 on the CPU too), any layout.
        weight: (V, D), as nn.Linear stores it, dtype and device of x; under torch.autocast all three are cast.
        target: x.shape[:-1], int64 or int32, device of x: rows of weight, or ignore_index.
        bias: (V,), dtype and device of x, or None.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as for cross_entropy; constants to torch.compile.
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
    want_dx = forms_gradients and x.requires_grad
    want_dw = forms_gradients and any(p is not None and p.requires_grad for p in (weight, bias))
    target_rows = target.reshape(-1).contiguous()
    loss, *_ = _fwd(as_rows(x), weight, target_rows, bias, *options, reduction, want_dx, want_dw)
    return loss.reshape(target.shape) if reduction == "none" else loss
