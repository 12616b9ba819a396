"""Layer normalization over the last axis, alone or fused with the residual addition before it.

    forward    h = z x + residual (or x)    mu = mean_n(h)    r = 1 / sqrt(mean_n((h - mu)^2) + eps)
               y = (h - mu) r w + b
    backward   xhat = (h - mu) r    g = dy w
               dresidual = r (g - mean_n(g) - xhat mean_n(g xhat)) + dh
               dx = z dresidual
               dw = sum_m dy xhat    db = sum_m dy
               dh is the gradient that reached the output h itself
               d(added bias) = sum_m dx, for a bias that is already part of x; optional
    dropout    z = kept / (1 - dropout_p), from core/dropout.py; z = 1 without dropout

Shapes       x, residual, h, y: (M, N)   w, b, added bias: (N,)   mu, r: (M,) float32
             M = all leading axes, flattened
Precision    any float dtype in and out; h is rounded to its dtype before the statistics, which are
             float32
Cost         memory-bound; with E bytes per element the forward moves 2 E per element (4 E with a
             residual), the backward 3 E (4 E, with dropout 5 E: dx and dresidual then differ);
             cost() gives bytes and FLOPs
Determinism  column sums are computed in two stages of fixed order, without atomics; the order
             depends on the number of SMs only
Source       Ba, Kiros & Hinton 2016, arXiv:1607.06450

The kernels are in _kernels.py and _wide_kernels.py, their launchers in launch.py. rms_norm uses the
same kernels without a mean and without a bias.
"""

import torch
from torch import Tensor

from ..core.added_bias import attach, column_sums
from ..core.dropout import Dropout, drop, resolve_dropout
from ..core.layout import as_rows, like_rows_of, wide
from ..core.op import define_op, keep_needed, public
from ._checks import check, check_residual
from .launch import launch_norm_bwd, launch_norm_fwd, norm_cost

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, added_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in x's dtype, and the mean and reciprocal standard deviation of each row.

    added_bias has no influence on the outputs. It is an argument because it gets a gradient.
    """
    h = wide(x)
    # Detached: y does not change if a constant is added to a row, so the mean gets no gradient.
    mean = h.detach().mean(-1, keepdim=True)
    # Pass h - mu to PyTorch. It computes h r - mu r, which cancels if the mean is far from zero.
    w, b = (None if parameter is None else parameter.to(h.dtype) for parameter in (weight, bias))
    y, _, rstd = torch.native_layer_norm(h - mean, h.shape[-1:], w, b, eps)
    return y.to(x.dtype), mean[:, 0], rstd[:, 0]


def reference_add_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    added_bias: Tensor | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y in x's dtype, h = z x + residual in the dtype of x + residual, mean, rstd.

    x, residual, y and h are (..., N). If x and residual became rows before this operator, autograd
    would give them gradients in the same memory, and each would change the other.
    """
    h = (drop(x, dropout) + residual).to(torch.promote_types(x.dtype, residual.dtype))
    h = h.contiguous()
    y, mean, rstd = reference_fwd(as_rows(h), weight, bias, eps, None)
    return like_rows_of(h, y.to(x.dtype)), h, mean, rstd


def reference_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    added_dtype: torch.dtype | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, residual, weight, bias and added_bias.

    The gradient of residual is empty without dropout, where it equals that of x. The gradient of
    bias is empty unless `has_bias`. That of added_bias has the dtype `added_dtype` and is empty if
    this is None.
    """
    centered = wide(h) - mean[:, None]  # as in the forward
    w = weight.to(centered.dtype)
    # w takes the place of the bias, whose values have no influence on the gradients.
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.to(w.dtype), centered, h.shape[-1:], torch.zeros_like(mean)[:, None], rstd[:, None],
        w, w if has_bias else None, [True, True, has_bias],
    )  # fmt: skip
    if dh is not None:
        dx += dh
    dresidual = h.new_empty(0)
    if dropout.dropout_p > 0:
        dresidual = dx.to(h.dtype)
        dx = drop(dx, dropout)
    db = dw.new_empty(0) if db is None else db
    dadded = column_sums(dx, added_dtype)
    return dx.to(h.dtype), dresidual, dw.to(weight.dtype), db.to(weight.dtype), dadded


# --- launchers


def launch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, added_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel of `reference_fwd`."""
    y, _, mean, rstd = launch_norm_fwd(x, None, weight, bias, eps, Dropout(), centered=True)
    return y, mean, rstd


def launch_add_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    added_bias: Tensor | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel of `reference_add_fwd`."""
    rows = as_rows(x), as_rows(residual)
    y, h, mean, rstd = launch_norm_fwd(*rows, weight, bias, eps, dropout, centered=True)
    return like_rows_of(x, y), like_rows_of(x, h), mean, rstd


def launch_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    added_dtype: torch.dtype | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel of `reference_bwd`."""
    return launch_norm_bwd(dy, dh, h, weight, mean, rstd, has_bias, added_dtype, dropout)


def cost(
    M: int, N: int, itemsize: int, *, residual: bool = False, dropout: bool = False
) -> dict[str, int]:
    """Return the least bytes to move and about the FLOPs for M rows of N elements."""
    return norm_cost(M * N, itemsize, residual=residual, dropout=dropout, fwd_flops=8, bwd_flops=14)


# --- operator: on a CPU in 32 bits the references run as composites, differentiated by autograd


def composite_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, added_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_fwd`, with a gradient of added_bias."""
    return reference_fwd(attach(x, added_bias), weight, bias, eps, None)


def composite_add_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    added_bias: Tensor | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference_add_fwd`, with a gradient of added_bias."""
    return reference_add_fwd(attach(x, added_bias), residual, weight, bias, eps, None, dropout)


_fwd = define_op(
    "layer_norm_fwd", launch=launch_fwd, reference=reference_fwd, composite=composite_fwd
)
_add_fwd = define_op(
    "add_layer_norm_fwd",
    launch=launch_add_fwd,
    reference=reference_add_fwd,
    composite=composite_add_fwd,
)
_bwd = define_op("layer_norm_bwd", launch=launch_bwd, reference=reference_bwd)


def _save(ctx, inputs, output):
    x, weight, bias, _, added_bias = inputs
    _, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.added_dtype = None if added_bias is None else added_bias.dtype
    # None instead of zeros for the gradients of mean and rstd, which nobody uses.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)


def _grad(ctx, dy, _dmean, _drstd):
    if dy is None:
        return (None,) * 5
    added_dtype = ctx.added_dtype if ctx.needs_input_grad[-1] else None
    grads = _bwd(as_rows(dy), None, *ctx.saved_tensors, ctx.has_bias, added_dtype, Dropout())
    needs = (True, False, True, ctx.has_bias, added_dtype is not None)
    dx, _, dw, db, dadded = keep_needed(grads, needs)
    return dx, dw, db, None, dadded


def _save_add(ctx, inputs, output):
    x, residual, weight, bias, _, added_bias, dropout = inputs
    _, h, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.added_dtype = None if added_bias is None else added_bias.dtype
    ctx.dtypes = x.dtype, residual.dtype
    ctx.dropout_p = dropout.dropout_p
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, mean, rstd, dropout.seed)


def _grad_add(ctx, dy, dh, _dmean, _drstd):
    if dy is None and dh is None:
        return (None,) * 7
    dy = torch.zeros_like(dh) if dy is None else dy
    dh = None if dh is None else as_rows(dh)
    added_dtype = ctx.added_dtype if ctx.needs_input_grad[5] else None
    h, *saved, seed = ctx.saved_tensors
    dropout = Dropout(dropout_p=ctx.dropout_p, seed=seed)
    grads = _bwd(as_rows(dy), dh, as_rows(h), *saved, ctx.has_bias, added_dtype, dropout)
    needs = (True, ctx.dropout_p > 0, True, ctx.has_bias, added_dtype is not None)
    dx, dresidual, dw, db, dadded = keep_needed(grads, needs)
    dx = like_rows_of(h, dx)
    # One tensor for both. Autograd then copies it where it would become the .grad of both.
    dresidual = dx if dresidual is None else like_rows_of(h, dresidual)
    x_dtype, residual_dtype = ctx.dtypes
    return dx.to(x_dtype), dresidual.to(residual_dtype), dw, db, None, dadded, None


_fwd.register_autograd(_grad, setup_context=_save)
_add_fwd.register_autograd(_grad_add, setup_context=_save_add)


@public
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    added_bias: Tensor | None = None,
) -> Tensor:
    """Normalize each vector along the last axis, then multiply by `weight` and add `bias`.

    Normalized vectors have mean 0 and variance 1.

    Args:
        x: (..., N), N up to 65,536, float32, bfloat16 or float16 (float64 on a CPU too), any
            layout.
        weight: (N,), any float dtype, device of x.
        bias: (N,), any float dtype, device of x, or None.
        eps: added to the variance, at least 0; in units of x squared.
        added_bias: (N,), any float dtype, device of x, or None: a bias that the layer before has
            added to x without a gradient. Its value is not read. It gets its gradient here: the sum
            of the rows of x's gradient, which this operator's backward has in registers.
    Returns: (..., N), dtype of x.
    Raises:
        ValueError: weight, bias or added_bias does not have the documented shape, device or dtype,
            or eps is negative.
        TypeError: x is float64 on a GPU.
    """
    eps = check("layer_norm", x, weight, eps, bias=bias, added_bias=added_bias)
    weight, bias = _same_dtype(weight, bias)
    y, _, _ = _fwd(as_rows(x), weight, bias, eps, added_bias)
    return like_rows_of(x, y)


@public
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    added_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `residual` to `x` and normalize the sum, in one pass over memory.

    With dropout, drop elements of `x` before the addition, in the same pass. Only the seed is kept
    for the backward, no mask.

    With added_bias, the gradient of a linear layer's bias needs no pass over memory either:

        branch = linear(a, w, b.detach())
        y, h = add_layer_norm(branch, h, weight, bias, added_bias=b)

    Args:
        x: (..., N), as for layer_norm: the output of a block.
        residual: shape and device of x, any float dtype: the residual stream.
        weight, bias, eps, added_bias: as for layer_norm.
        dropout_p: probability of dropping an element of x, in [0, 1). Default: 0.
        seed: seed of the mask, an int or a () int64 tensor on the device of x. The mask depends on
            the seed and on the index of an element only. Default: drawn from PyTorch's generator of
            that device.
    Returns: (y, h), each (..., N):
        h = dropout(x) + residual, in the dtype that PyTorch gives x + residual;
        y = layer_norm(h, weight, bias), in the dtype of x.
    Raises: as layer_norm; ValueError if residual does not have the shape and device of x, or if
        dropout_p or seed is not as documented.
    """
    eps = check("add_layer_norm", x, weight, eps, bias=bias, added_bias=added_bias)
    check_residual("add_layer_norm", x, residual)
    weight, bias = _same_dtype(weight, bias)
    dropout = resolve_dropout("add_layer_norm", dropout_p, seed, x.device)
    y, h, _, _ = _add_fwd(x, residual, weight, bias, eps, added_bias, dropout)
    return y, h


def _same_dtype(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both contiguous, in a dtype that holds the values of both."""
    if bias is None:
        return weight.contiguous(), None
    if weight.dtype != bias.dtype:
        dtype = torch.promote_types(weight.dtype, bias.dtype)
        weight, bias = weight.to(dtype), bias.to(dtype)
    return weight.contiguous(), bias.contiguous()
