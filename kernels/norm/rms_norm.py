"""Root-mean-square normalization over the last axis, alone or fused with the residual addition.

    forward    h = z x + residual (or x)    r = 1 / sqrt(mean_n(h^2) + eps)    y = h r w
    backward   xhat = h r    g = dy w
               dresidual = r (g - xhat mean_n(g xhat)) + dh
               dx = z dresidual
               dw = sum_m dy xhat
               dh is the gradient that reached the output h itself
               d(added bias) = sum_m dx, for a bias that is already part of x; optional
    dropout    z = kept / (1 - dropout_p), from core/dropout.py; z = 1 without dropout

Shapes       x, residual, h, y: (M, N)   w, added bias: (N,)   r: (M,) float32
             M = all leading axes, flattened
Precision    any float dtype in and out; h is rounded to its dtype before the statistics, which are
             float32
Cost         memory-bound; the bytes of layer_norm; cost() gives bytes and FLOPs
Determinism  as layer_norm
Source       Zhang & Sennrich 2019, arXiv:1910.07467

The kernels are those of layer_norm (_kernels.py and _wide_kernels.py, launched by launch.py). They
compute rms_norm if they get no mean and no bias.
"""

import torch
from torch import Tensor

from ..core.added_bias import column_sums
from ..core.dropout import Dropout, drop, resolve_dropout
from ..core.layout import as_rows, like_rows_of, wide
from ..core.op import define_op, keep_needed, public
from ._checks import check, check_residual
from .launch import launch_norm_bwd, launch_norm_fwd, norm_cost

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    x: Tensor, weight: Tensor | None, eps: float, added_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y in x's dtype, and the reciprocal root mean square of each row.

    added_bias has no influence on the outputs. It is an argument because it gets a gradient.
    """
    h = wide(x)
    rstd = torch.rsqrt(h.square().mean(-1) + eps)
    y = h * rstd[:, None]
    if weight is not None:
        y.mul_(weight)
    return y.to(x.dtype), rstd


def reference_add_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    added_bias: Tensor | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in x's dtype, h = z x + residual in the dtype of x + residual, rstd.

    x, residual, y and h are (..., N), as in layer_norm's reference_add_fwd.
    """
    h = (drop(x, dropout) + residual).to(torch.promote_types(x.dtype, residual.dtype))
    h = h.contiguous()
    y, rstd = reference_fwd(as_rows(h), weight, eps, None)
    return like_rows_of(h, y.to(x.dtype)), h, rstd


def reference_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    added_dtype: torch.dtype | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, residual, weight and added_bias.

    The gradient of residual is empty without dropout, where it equals that of x. That of weight is
    empty without a weight. That of added_bias has the dtype `added_dtype` and is empty if this is
    None.
    """
    wide_dy = wide(dy)
    xhat = wide(h) * rstd[:, None]
    g = wide_dy if weight is None else wide_dy * weight
    dx = torch.addcmul(g, xhat, (g * xhat).mean(-1, keepdim=True), value=-1).mul_(rstd[:, None])
    if dh is not None:
        dx += dh
    dresidual = h.new_empty(0)
    if dropout.dropout_p > 0:
        dresidual = dx.to(h.dtype)
        dx = drop(dx, dropout)
    dw = h.new_empty(0) if weight is None else (wide_dy * xhat).sum(0).to(weight.dtype)
    return dx.to(h.dtype), dresidual, dw, column_sums(dx, added_dtype)


# --- launchers


def launch_fwd(
    x: Tensor, weight: Tensor | None, eps: float, added_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the kernel of `reference_fwd`."""
    y, _, _, rstd = launch_norm_fwd(x, None, weight, None, eps, Dropout(), centered=False)
    return y, rstd


def launch_add_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    added_bias: Tensor | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel of `reference_add_fwd`."""
    rows = as_rows(x), as_rows(residual)
    y, h, _, rstd = launch_norm_fwd(*rows, weight, None, eps, dropout, centered=False)
    return like_rows_of(x, y), like_rows_of(x, h), rstd


def launch_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    added_dtype: torch.dtype | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel of `reference_bwd`."""
    dx, dresidual, dw, _, dadded = launch_norm_bwd(
        dy, dh, h, weight, None, rstd, False, added_dtype, dropout
    )
    return dx, dresidual, dw, dadded


def cost(
    M: int, N: int, itemsize: int, *, residual: bool = False, dropout: bool = False
) -> dict[str, int]:
    """Return the least bytes to move and about the FLOPs for M rows of N elements."""
    return norm_cost(M * N, itemsize, residual=residual, dropout=dropout, fwd_flops=4, bwd_flops=10)


# --- operator
# No composite, unlike layer_norm: for long rows the gradient that autograd derives from the
# reference is slower than reference_bwd. Forward and backward in float32, on one thread of an AMD
# EPYC, November 2026: (768, 384) takes 2.6 ms with a composite and 1.3 ms without; (768, 128) takes
# 0.5 ms with a composite and 0.6 ms without.

_fwd = define_op("rms_norm_fwd", launch=launch_fwd, reference=reference_fwd)
_add_fwd = define_op("add_rms_norm_fwd", launch=launch_add_fwd, reference=reference_add_fwd)
_bwd = define_op("rms_norm_bwd", launch=launch_bwd, reference=reference_bwd)


def _save(ctx, inputs, output):
    x, weight, _, added_bias = inputs
    _, rstd = output
    ctx.added_dtype = None if added_bias is None else added_bias.dtype
    # None instead of zeros for the gradient of rstd, which nobody uses.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _grad(ctx, dy, _drstd):
    if dy is None:
        return (None,) * 4
    added_dtype = ctx.added_dtype if ctx.needs_input_grad[-1] else None
    x, weight, rstd = ctx.saved_tensors
    grads = _bwd(as_rows(dy), None, x, weight, rstd, added_dtype, Dropout())
    needs = (True, False, weight is not None, added_dtype is not None)
    dx, _, dw, dadded = keep_needed(grads, needs)
    return dx, dw, None, dadded


def _save_add(ctx, inputs, output):
    x, residual, weight, _, added_bias, dropout = inputs
    _, h, rstd = output
    ctx.added_dtype = None if added_bias is None else added_bias.dtype
    ctx.dtypes = x.dtype, residual.dtype
    ctx.dropout_p = dropout.dropout_p
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, rstd, dropout.seed)


def _grad_add(ctx, dy, dh, _drstd):
    if dy is None and dh is None:
        return (None,) * 6
    dy = torch.zeros_like(dh) if dy is None else dy
    dh = None if dh is None else as_rows(dh)
    added_dtype = ctx.added_dtype if ctx.needs_input_grad[4] else None
    h, weight, rstd, seed = ctx.saved_tensors
    dropout = Dropout(dropout_p=ctx.dropout_p, seed=seed)
    grads = _bwd(as_rows(dy), dh, as_rows(h), weight, rstd, added_dtype, dropout)
    needs = (True, ctx.dropout_p > 0, weight is not None, added_dtype is not None)
    dx, dresidual, dw, dadded = keep_needed(grads, needs)
    dx = like_rows_of(h, dx)
    dresidual = dx if dresidual is None else like_rows_of(h, dresidual)
    x_dtype, residual_dtype = ctx.dtypes
    return dx.to(x_dtype), dresidual.to(residual_dtype), dw, None, dadded, None


_fwd.register_autograd(_grad, setup_context=_save)
_add_fwd.register_autograd(_grad_add, setup_context=_save_add)


@public
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    added_bias: Tensor | None = None,
) -> Tensor:
    """Scale each vector along the last axis to unit root mean square, then multiply by `weight`.

    Args:
        x: (..., N), N up to 65,536, float32, bfloat16 or float16 (float64 on a CPU too), any
            layout.
        weight: (N,), any float dtype, device of x, or None for ones.
        eps: added to the mean square, at least 0; in units of x squared.
        added_bias: (N,), any float dtype, device of x, or None: a bias that the layer before has
            added to x without a gradient. It gets its gradient here, as for layer_norm.
    Returns: (..., N), dtype of x.
    Raises:
        ValueError: weight or added_bias does not have the documented shape, device or dtype, or
            eps is negative.
        TypeError: x is float64 on a GPU.
    """
    eps = check("rms_norm", x, weight, eps, added_bias=added_bias)
    weight = None if weight is None else weight.contiguous()
    y, _ = _fwd(as_rows(x), weight, eps, added_bias)
    return like_rows_of(x, y)


@public
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    added_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `residual` to `x` and normalize the sum, in one pass over memory.

    With dropout, drop elements of `x` before the addition, as add_layer_norm does.

    Args:
        x: (..., N), as for rms_norm: the output of a block.
        residual: shape and device of x, any float dtype: the residual stream.
        weight, eps, added_bias: as for rms_norm.
        dropout_p, seed: as for add_layer_norm.
    Returns: (y, h), each (..., N):
        h = dropout(x) + residual, in the dtype that PyTorch gives x + residual;
        y = rms_norm(h, weight), in the dtype of x.
    Raises: as rms_norm; ValueError if residual does not have the shape and device of x, or if
        dropout_p or seed is not as documented.
    """
    eps = check("add_rms_norm", x, weight, eps, added_bias=added_bias)
    check_residual("add_rms_norm", x, residual)
    dropout = resolve_dropout("add_rms_norm", dropout_p, seed, x.device)
    weight = None if weight is None else weight.contiguous()
    y, h, _ = _add_fwd(x, residual, weight, eps, added_bias, dropout)
    return y, h
