"""Root-mean-square normalization of the last axis with a learned gain, alone or fused with the residual addition before it.

    forward    h = x + residual (or x)    r = 1 / sqrt(mean_n(h^2) + eps)    y = h r w
    backward   xhat = h r    g = dy w    dh = r (g - xhat mean_n(g xhat)) + dh'    dw = sum_m dy xhat
               dx = dresidual = dh, where dh' is the gradient that reached h itself

Shapes     x, residual, h, y: (M, N)   w: (N,)   r: (M,) float32      M = every leading axis, flattened
Precision  any float dtype in and out; h is rounded to its dtype before the statistics, which are float32
Cost       memory-bound, in bytes as layer_norm; see cost()
Determinism  as layer_norm, whose kernels run here without a mean (_layer_norm_kernels.py)
Source     Zhang & Sennrich 2019, arXiv:1910.07467
"""

import torch
from torch import Tensor

from ..core.layout import as_rows, like_rows_of, wide
from ..core.op import define_op, public
from ._checks import check, check_residual
from ._launch import launch_norm_bwd, launch_norm_fwd, norm_cost

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y in x's dtype, and the reciprocal root mean square of each row."""
    h = wide(x)
    rstd = torch.rsqrt(h.square().mean(-1) + eps)
    return (h * rstd[:, None]).mul_(weight).to(x.dtype), rstd


def reference_add_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in x's dtype, h = x + residual in their common dtype, rstd."""
    h = x + residual
    y, rstd = reference_fwd(h, weight, eps)
    return y.to(x.dtype), h, rstd


def reference_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of h and weight; `dh` is the gradient that reached h from elsewhere."""
    wide_dy = wide(dy)
    xhat = wide(h) * rstd[:, None]
    g = wide_dy * weight
    dx = torch.addcmul(g, xhat, (g * xhat).mean(-1, keepdim=True), value=-1).mul_(rstd[:, None])
    if dh is not None:
        dx += dh
    return dx.to(h.dtype), (wide_dy * xhat).sum(0).to(weight.dtype)


# --- launchers: the kernels are layer_norm's


def launch_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    y, _, _, rstd = launch_norm_fwd(x, None, weight, None, eps, centered=False)
    return y, rstd


def launch_add_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_add_fwd`."""
    y, h, _, rstd = launch_norm_fwd(x, residual, weight, None, eps, centered=False)
    return y, h, rstd


def launch_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_bwd`."""
    dx, dw, _ = launch_norm_bwd(dy, dh, h, weight, None, rstd, False)
    return dx, dw


def cost(M: int, N: int, itemsize: int, *, residual: bool = False) -> dict[str, int]:
    """Least bytes to move, forward and backward, and FLOPs (about), for M rows of N elements of `itemsize` bytes."""
    return norm_cost(M * N, itemsize, residual=residual, flops=(4, 10))


# --- operator

_fwd = define_op("rms_norm_fwd", launch=launch_fwd, reference=reference_fwd)
_add_fwd = define_op("add_rms_norm_fwd", launch=launch_add_fwd, reference=reference_add_fwd)
_bwd = define_op("rms_norm_bwd", launch=launch_bwd, reference=reference_bwd)


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    _, rstd = output
    # Nobody differentiates rstd: no zeros for its gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _grad(ctx, dy, _drstd):
    return (None,) * 3 if dy is None else (*_bwd(as_rows(dy), None, *ctx.saved_tensors), None)


def _save_add(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, h, rstd = output
    ctx.dtypes = x.dtype, residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, rstd)


def _grad_add(ctx, dy, dh, _drstd):
    if dy is None and dh is None:
        return (None,) * 4
    dy = torch.zeros_like(dh) if dy is None else as_rows(dy)
    dx, dw = _bwd(dy, None if dh is None else as_rows(dh), *ctx.saved_tensors)
    return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dw, None


_fwd.register_autograd(_grad, setup_context=_save)
_add_fwd.register_autograd(_grad_add, setup_context=_save_add)


@public
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Scale each vector along the last axis to unit root mean square, then by `weight`.

    Args:
        x: (..., N), float32, bfloat16 or float16 (float64 on the CPU too), N up to 65,536, any layout.
        weight: (N,), any float dtype, device of x.
        eps: added to the mean square; in units of x squared.
    Returns: (..., N), dtype of x.
    Raises: ValueError if weight is not (N,) or is on another device; TypeError for float64 on a GPU.
    """
    check("rms_norm", x, weight)
    y, _ = _fwd(as_rows(x), weight.contiguous(), eps)
    return like_rows_of(x, y)


@public
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add `residual` to `x` and normalize the sum, in one pass over memory.

    Args:
        x: (..., N), as for rms_norm: a block's output.
        residual: shape and device of x, any float dtype: the residual stream.
        weight, eps: as for rms_norm.
    Returns: (y, h): h = x + residual in their common dtype, y = rms_norm(h, weight) in the dtype of x.
    Raises: as rms_norm, and ValueError if residual differs from x in shape or device.
    """
    check("add_rms_norm", x, weight)
    check_residual("add_rms_norm", x, residual)
    y, h, _ = _add_fwd(as_rows(x), as_rows(residual), weight.contiguous(), eps)
    return like_rows_of(x, y), like_rows_of(x, h)
