"""Cross-entropy of the outputs of a linear layer, without storing all of its logits x w^T + b.

    forward    for each chunk of rows: logits = x w^T + b and the row losses l; with gradients also
               dlogits = dl/dlogits    dx = dlogits w    dw += dlogits^T x    db += sum_n dlogits
    backward   multiply dx, dw and db by dloss (for the mean: dloss / count). With reduction "none"
               each row has its own dloss: the backward computes the chunks again.

Shapes     x, dx: (N, D)   w, dw: (V, D)   b, db: (V,)   target: (N,)   l: (N,) float32
           N = all leading axes, flattened
Padding    the rows of w and b from vocab_size on are padding, not classes. The matmuls include
           them, because cuBLAS is slow if V is odd. The loss kernel gives them probability 0 and
           dlogits 0, so their dw and db are 0.
Precision  any float dtype in. A float32 w can have a 16-bit x: the matmuls take a copy in 16 bits,
           and dw is not rounded to 16 bits. dw and db are float32 and unscaled until the backward
           has scaled them, so that they are rounded at most once. dx has the dtype of x and is
           rounded before and after the scaling; the second rounding is exact if dloss / count is
           a power of two. The reference computes matmuls in float32, from float32 copies of 16-bit
           operands.
Chunks     chunks.py chooses how many rows the kernels take at a time, and how many the reference
           does. A chunk of logits and the copy of w are the only large buffers of the kernels. On
           AMD no GEMM of 16-bit operands has a float32 result: matmul_out makes float32 copies of
           a chunk and of its rows of x.
Memory     largest memory of the kernels, as a fraction of the unfused loss in 16 bits. That holds
           3 N V elements at once: logits, log-probabilities and their gradient. V = 50,304:
             N         D = 768    1024      1280      1600
             16,384    14.8 %     13.2 %    12.8 %    17.2 %
             32,768     7.7 %      6.9 %     6.8 %     9.1 %
             65,536     4.1 %      3.8 %     3.8 %     5.1 %
           The copy of a float32 w adds V D elements of 16 bits.
Cost       compute-bound: 2 N V D FLOPs for the loss, 4 N V D more for the gradients; see cost()
Files      _linear_reference.py: the reference. block_loss.py, _kernels.py and launch.py are shared
           with cross_entropy. One kernel overwrites a chunk of logits with its gradient. Matmuls
           are PyTorch's (cuBLAS).
Source     chunks with gradients in the forward: Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.device import DEFAULT_SM_COUNT, sm_count
from ..core.layout import as_rows
from ..core.matmul import autocast, matmul_out
from ..core.op import define_op, keep_needed, public
from ._checks import check_linear, check_target
from ._linear_reference import (
    empty_gradients,
    empty_rows,
    reference_fwd,
    reference_rows_bwd,
    reference_scale,
    shapes_fwd,
    shapes_rows_bwd,
)
from .block_loss import results, row_blocks
from .chunks import plan, row_stride
from .launch import launch_reduce, launch_rows_fwd, launch_rows_fwd_bwd, launch_scale
from .options import LossOptions

# --- launchers: allocate, plan, launch by keyword


def launch_fwd(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    vocab_size: int,
    want_dx: bool,
    want_dw: bool,
    want_lse: bool,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    grads = empty_gradients(x, weight, bias, want_dx, want_dw)
    rows = empty_rows(x, want_lse, want_correct)
    loss = _launch_chunks(x, weight, target, bias, None, options, vocab_size, grads, rows)
    return *launch_reduce(loss, target, options), *grads, *rows


def launch_rows_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    vocab_size: int,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_rows_bwd`."""
    dx, dw, db = empty_gradients(x, weight, bias, want_dx, want_dw)
    _launch_chunks(x, weight, target, bias, dloss, options, vocab_size, (dx, dw, db))
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


def _launch_chunks(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    dloss: Tensor | None,
    options: LossOptions,
    vocab_size: int,
    grads: tuple[Tensor, Tensor, Tensor],
    rows_out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the row losses. Write the gradients of sum_n dloss_n l_n to `grads`, unless empty.

    Write lse and correct to `rows_out`, unless they are empty. Default of dloss: ones.
    """
    N, D = x.shape
    V = weight.shape[0]
    loss = x.new_empty(N, dtype=torch.float32)
    dx, dw, db = grads
    lse, correct = rows_out or empty_rows(x, False, False)
    db.zero_()
    if N == 0:
        dw.zero_()  # otherwise the first chunk overwrites dw
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    rows = plan(N, V, D, sm_count(x.device))
    buffer = x.new_empty(min(rows, N), row_stride(V))
    for chunk in row_blocks(N, rows):
        # logits
        logits = buffer[: chunk.stop - chunk.start, :V]
        if bias is None:
            torch.mm(x[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[chunk], weight.t(), out=logits)

        # losses, and dlogits over the logits
        statistics = loss.new_empty(2, logits.shape[0]) if lse.numel() else None
        extra = statistics, correct[chunk] if correct.numel() else None, vocab_size
        if any(grad.numel() for grad in grads):
            dloss_chunk = None if dloss is None else dloss[chunk]
            launch_rows_fwd_bwd(logits, target[chunk], dloss_chunk, options, loss[chunk], *extra)
        else:
            launch_rows_fwd(logits, target[chunk], options, loss[chunk], *extra)
        if statistics is not None:
            torch.sum(statistics, 0, out=lse[chunk])
        dlogits = logits

        # gradients of x, weight and bias
        if dx.numel():
            matmul_out(dlogits, weight, dx[chunk])
        if dw.numel():
            matmul_out(dlogits.t(), x[chunk], dw, accumulate=chunk.start > 0)
        if db.numel():
            db += dlogits.sum(0, dtype=torch.float32)
    return loss


def cost(
    N: int, D: int, V: int, itemsize: int, *, weight_itemsize: int = 0, sms: int = DEFAULT_SM_COUNT
) -> dict[str, int]:
    """Least bytes to move, FLOPs of the matmuls, and memory.

    "fwd" is the loss alone. "bwd" is the additional cost of the gradients, which the forward
    computes unless the reduction is "none". "workspace_bytes" is temporary memory of the kernels:
    a chunk of logits, and the copy of a float32 weight in 16 bits. "saved_bytes" is memory kept
    between forward and backward: dx, and dw in float32. Both leave out a few numbers per row.

    Args:
        V: rows of the weight, with its padding.
        itemsize: bytes per element of x.
        weight_itemsize: bytes per element of the weight. 0: those of x.
        sms: number of multiprocessors.
    """
    weight_itemsize = weight_itemsize or itemsize
    inputs = N * D * itemsize + V * D * weight_itemsize
    chunk = min(plan(N, V, D, sms), N) * row_stride(V) * itemsize
    weight_copy = V * D * itemsize if weight_itemsize != itemsize else 0
    return {
        "fwd_bytes": inputs,
        "bwd_bytes": inputs,
        "fwd_flops": 2 * N * V * D,
        "bwd_flops": 4 * N * V * D,
        "workspace_bytes": chunk + weight_copy,
        "saved_bytes": itemsize * N * D + 4 * V * D,
    }


# --- operator

_fwd = define_op(
    "linear_cross_entropy_fwd", launch=launch_fwd, reference=reference_fwd, shapes=shapes_fwd
)
_scale = define_op(
    "linear_cross_entropy_scale",
    launch=launch_scale,
    reference=reference_scale,
    public_name="linear_cross_entropy",
)
_rows_bwd = define_op(
    "linear_cross_entropy_rows_bwd",
    launch=launch_rows_bwd,
    reference=reference_rows_bwd,
    shapes=shapes_rows_bwd,
    public_name="linear_cross_entropy",
)


def _save(ctx, inputs, output):
    x, weight, target, bias, ctx.options, ctx.vocab_size, *_ = inputs
    _, divisor, *grads, _, _ = output
    ctx.weight_dtype = weight.dtype
    # Do not allocate zeros for the gradients of the outputs dx, dw and db: nobody uses them.
    ctx.set_materialize_grads(False)
    if ctx.options.reduction == "none":
        ctx.save_for_backward(x, weight, target, bias)
    else:
        ctx.save_for_backward(divisor, *grads)


def _grad(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 10
    needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    if ctx.options.reduction == "none":
        want_dw = needs_weight or needs_bias
        arguments = (ctx.options, ctx.vocab_size, needs_x, want_dw)
        grads = _rows_bwd(dloss, *ctx.saved_tensors, *arguments)
    else:
        grads = _scale(dloss, *ctx.saved_tensors, ctx.weight_dtype)
    dx, dw, db = keep_needed(grads, (needs_x, needs_weight, needs_bias))
    return dx, dw, None, db, *(None,) * 6


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
    softcap: float | None = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
    return_lse: bool = False,
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute the cross-entropy of the logits x @ weight.T + bias without storing all of them.

    If an input needs a gradient, the forward computes it and the backward only scales it. With
    reduction "none" the backward computes the logits again.

    Args:
        x: (..., D), float32, bfloat16 or float16 (on the CPU also float64), any layout.
            torch.autocast casts x.
        weight: (V, D), as nn.Linear stores it, device of x; dtype of x, or float32. With a 16-bit x
            a float32 weight is rounded for the matmuls, and its gradient is not rounded.
        target: x.shape[:-1], int64 or int32, device of x. Rows of weight or ignore_index.
        bias: (V,), dtype of x, or float32, device of weight, or None.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as for cross_entropy.
        vocab_size: number of classes. Rows of weight and bias from vocab_size on are padding: they
            must be finite, get no probability, and their gradients are 0. None: all rows.
        return_lse, return_correct: as for cross_entropy.
    Returns: loss; or a tuple of loss, lse and correct, as for cross_entropy.
    Raises: ValueError if shapes, dtypes or devices do not match or an option is out of range.
        IndexError on the CPU for a target that is neither a class nor ignore_index; on other
        devices the loss is NaN. TypeError for float64 on a GPU.
    """
    options = LossOptions(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap or 0.0,
        reduction=reduction,
    )
    x, weight, bias = _autocast(x, weight, bias)
    check_linear("linear_cross_entropy", x, weight, bias, vocab_size)
    check_target("linear_cross_entropy", "x", x, target, ignore_index)
    options.check("linear_cross_entropy")
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    weight, bias = _pad_classes(weight, bias, x)
    compute_gradients = torch.is_grad_enabled() and reduction != "none"
    want_dx = compute_gradients and x.requires_grad
    needs_dw = weight.requires_grad or (bias is not None and bias.requires_grad)
    want_dw = compute_gradients and needs_dw
    target_rows = target.reshape(-1).contiguous()
    operands = as_rows(x), weight, target_rows, bias, options, vocab_size
    loss, *_, lse, correct = _fwd(*operands, want_dx, want_dw, return_lse, return_correct)
    lse, correct = lse if return_lse else None, correct if return_correct else None
    return results(loss, lse, correct, target, vocab_size, options)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as torch.autocast does, but keep a float32 weight: autocast would round its gradient."""
    (x,) = autocast(x)
    weight, bias = (
        value if value is None or value.dtype == torch.float32 else autocast(value)[0]
        for value in (weight, bias)
    )
    return x, weight, bias


def _pad_classes(weight: Tensor, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Give bias the dtype of weight. Pad both with zeros if V slows the matmuls on a GPU.

    With 16-bit operands cuBLAS is several times slower if V is not a multiple of 8. `vocab_size`
    leaves the padding out of the loss.
    """
    V = weight.shape[0]
    bias = None if bias is None else bias.to(weight.dtype)
    if not _is_slow(V, x):
        return weight, bias
    padding = row_stride(V) - V
    weight = F.pad(weight, (0, 0, 0, padding))
    return weight, None if bias is None else F.pad(bias, (0, padding))


def _is_slow(V: int, x: Tensor) -> bool:
    return V % 8 != 0 and x.device.type != "cpu" and x.dtype.itemsize == 2
