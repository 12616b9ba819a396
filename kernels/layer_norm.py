"""Layer normalization of the last axis with a learned gain and bias, alone or fused with the residual addition before it.

    forward    h = x + residual (or x)    mu = mean_n(h)    r = 1 / sqrt(mean_n((h - mu)^2) + eps)    y = (h - mu) r w + b
    backward   xhat = (h - mu) r    g = dy w    dh = r (g - mean_n(g) - xhat mean_n(g xhat)) + dh'
               dw = sum_m dy xhat    db = sum_m dy          dx = dresidual = dh, where dh' is the gradient that reached h itself

Shapes     x, residual, h, y: (M, N)   w, b: (N,)   mu, r: (M,) float32      M = every leading axis, flattened
Precision  any float dtype in and out; h is rounded to its dtype before the statistics, which are float32
Cost       memory-bound; plain in bytes an element of E bytes: forward 2 E (4 E with residual), backward 3 E (4 E), see cost()
Determinism  dw and db are summed in two stages of fixed order, no atomics; the order depends on the number of SMs alone
Source     Ba, Kiros & Hinton 2016, arXiv:1607.06450
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._device import DEFAULT_SM_COUNT, sm_count
from ._layer_norm_wide import _layer_norm_bwd_wide_kernel, _layer_norm_fwd_wide_kernel
from ._layout import as_rows, like_rows_of, wide
from ._op import define_op, public
from ._triton import cdiv, next_power_of_2, tl, triton

MAX_WIDTH = 65_536
# Rows up to this many elements stay in registers; wider ones are walked in tiles of WIDE_BLOCK_N (_layer_norm_wide.py).
MAX_RESIDENT_WIDTH = 8_192
WIDE_BLOCK_N = 2_048
# Elements of a tile: 16 for each of 128 threads. The backward holds six such tiles, about 100 of a thread's registers.
TILE_ELEMENTS = 2_048
COLUMNS_PER_PROGRAM, PARTIALS_PER_STEP = 32, 64


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in x's dtype, and the mean and reciprocal standard deviation of each row."""
    h = wide(x)
    mean = h.mean(-1, keepdim=True)
    # PyTorch's operator forms h r - mu r, whose terms cancel where the mean is far from zero: it gets h - mu.
    w, b = (None if parameter is None else parameter.to(h.dtype) for parameter in (weight, bias))
    y, _, rstd = torch.native_layer_norm(h - mean, h.shape[-1:], w, b, eps)
    return y.to(x.dtype), mean[:, 0], rstd[:, 0]


def reference_add_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y in x's dtype, h = x + residual in their common dtype, mean, rstd."""
    h = x + residual
    y, mean, rstd = reference_fwd(h, weight, bias, eps)
    return y.to(x.dtype), h, mean, rstd


def reference_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of h, weight and bias (empty without one); `dh` is the gradient that reached h from elsewhere."""
    centered = wide(h) - mean[:, None]  # as in the forward
    w = weight.to(centered.dtype)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        wide(dy), centered, h.shape[-1:], torch.zeros_like(mean)[:, None], rstd[:, None],
        w, w if has_bias else None, [True, True, has_bias],
    )  # fmt: skip
    if dh is not None:
        dx += dh
    db = dw.new_empty(0) if db is None else db
    return dx.to(h.dtype), dw.to(weight.dtype), db.to(weight.dtype)


# --- kernels: a program owns BLOCK_M whole rows (forward), or every P-th such block of rows (backward)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_residual_m,
    M, N, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]

    h = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs_m[:, None] * stride_residual_m + offs_n[None, :], mask=mask, other=0.0)
        rounded = (h + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offs_m[:, None] * N + offs_n[None, :], rounded, mask=mask)
        h = rounded.to(tl.float32)

    mean = tl.sum(h, axis=1) / N
    centered = tl.where(mask, h - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / N + eps)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_partial_ptr, db_partial_ptr,
    stride_dym, stride_dhm, stride_hm,
    M, N,
    HAS_DH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)

        # dy, and so g, is zero where masked: what xhat holds there never counts.
        xhat = (h - mean[:, None]) * rstd[:, None]
        g = dy * weight[None, :]
        mean_g = tl.sum(g, axis=1) / N
        mean_gx = tl.sum(g * xhat, axis=1) / N
        dx = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
        if HAS_DH:
            dh = tl.load(dh_ptr + offs_m[:, None] * stride_dhm + offs_n[None, :], mask=mask, other=0.0)
            dx += dh.to(tl.float32)
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += dy * xhat
        if HAS_BIAS:
            db += dy

    partial = pid.to(tl.int64) * N + offs_n
    tl.store(dw_partial_ptr + partial, tl.sum(dw, axis=0), mask=mask_n)
    if HAS_BIAS:
        tl.store(db_partial_ptr + partial, tl.sum(db, axis=0), mask=mask_n)


@triton.jit
def _layer_norm_bwd_weight_kernel(
    dw_partial_ptr, db_partial_ptr, dw_ptr, db_ptr,
    P, N,
    HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N columns and adds up their P partial sums."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dw = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < P)[:, None] & mask_n[None, :]
        dw += tl.load(dw_partial_ptr + offs_p[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
        if HAS_BIAS:
            db += tl.load(db_partial_ptr + offs_p[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + offs_n, tl.sum(dw, axis=0).to(dw_ptr.dtype.element_ty), mask=mask_n)
    if HAS_BIAS:
        tl.store(db_ptr + offs_n, tl.sum(db, axis=0).to(db_ptr.dtype.element_ty), mask=mask_n)


# --- launchers: allocate, plan, launch by keyword


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Launch sizes. `wide`: rows are walked in tiles of block_n; else a tile holds whole rows."""

    wide: bool
    block_m: int
    block_n: int
    num_warps: int
    partials: int

    @property
    def tile(self) -> dict:
        """Keyword arguments of the row kernels."""
        rows = {} if self.wide else {"BLOCK_M": self.block_m}
        return {**rows, "BLOCK_N": self.block_n, "num_warps": self.num_warps}


def plan(M: int, N: int, sms: int = DEFAULT_SM_COUNT) -> Plan:
    """Choose tiles for M rows of N elements on a device of `sms` multiprocessors.

    Tiles have about TILE_ELEMENTS elements, several rows where rows are short. The backward starts four programs an SM, as
    many as its registers let run at once, each summing one row of partial weight gradients.
    """
    wide = N > MAX_RESIDENT_WIDTH
    block_n = WIDE_BLOCK_N if wide else next_power_of_2(max(N, 16))
    block_m = 1 if wide else min(max(1, TILE_ELEMENTS // block_n), next_power_of_2(M))
    num_warps = min(16, max(1, block_m * block_n // 512))
    return Plan(wide=wide, block_m=block_m, block_n=block_n, num_warps=num_warps, partials=min(cdiv(M, block_m), 4 * sms))


def launch_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    y, _, mean, rstd = _launch_fwd(x, None, weight, bias, eps)
    return y, mean, rstd


def launch_add_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_add_fwd`."""
    return _launch_fwd(x, residual, weight, bias, eps)


def _launch_fwd(x, residual, weight, bias, eps):
    M, N = x.shape
    p = plan(M, N)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    h = x if residual is None else torch.empty((M, N), dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    residual = x if residual is None else residual
    kernel, rows = (_layer_norm_fwd_wide_kernel, {}) if p.wide else (_layer_norm_fwd_kernel, {"M": M})
    kernel[(cdiv(M, p.block_m),)](
        x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias, y_ptr=y, h_ptr=h, mean_ptr=mean, rstd_ptr=rstd,
        stride_xm=x.stride(0), stride_residual_m=residual.stride(0), **rows, N=N, eps=eps,
        HAS_RESIDUAL=h is not x, HAS_BIAS=bias is not None, **p.tile,
    )  # fmt: skip
    return y, h, mean, rstd


def launch_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_bwd`: row gradients and partial sums in one kernel, the rest of the sums in another."""
    M, N = h.shape
    p = plan(M, N, sm_count(h.device))
    dx = torch.empty((M, N), dtype=h.dtype, device=h.device)
    dw, db = torch.empty_like(weight), weight.new_empty(N if has_bias else 0)
    dw_partial = torch.empty((p.partials, N), dtype=torch.float32, device=h.device)
    db_partial = torch.empty_like(dw_partial) if has_bias else dw_partial
    kernel = _layer_norm_bwd_wide_kernel if p.wide else _layer_norm_bwd_kernel
    kernel[(p.partials,)](
        dy_ptr=dy, dh_ptr=dh, h_ptr=h, weight_ptr=weight, mean_ptr=mean, rstd_ptr=rstd,
        dx_ptr=dx, dw_partial_ptr=dw_partial, db_partial_ptr=db_partial,
        stride_dym=dy.stride(0), stride_dhm=0 if dh is None else dh.stride(0), stride_hm=h.stride(0), M=M, N=N,
        HAS_DH=dh is not None, HAS_BIAS=has_bias, **p.tile,
    )  # fmt: skip
    _layer_norm_bwd_weight_kernel[(cdiv(N, COLUMNS_PER_PROGRAM),)](
        dw_partial_ptr=dw_partial, db_partial_ptr=db_partial, dw_ptr=dw, db_ptr=db, P=p.partials, N=N,
        HAS_BIAS=has_bias, BLOCK_P=PARTIALS_PER_STEP, BLOCK_N=COLUMNS_PER_PROGRAM,
    )  # fmt: skip
    return dx, dw, db


def cost(M: int, N: int, itemsize: int, *, residual: bool = False) -> dict[str, int]:
    """Least bytes to move, forward and backward, and FLOPs (about), for M rows of N elements of `itemsize` bytes."""
    forward, backward = (4, 4) if residual else (2, 3)
    elements = M * N
    return {
        "fwd_bytes": forward * elements * itemsize,
        "bwd_bytes": backward * elements * itemsize,
        "fwd_flops": 8 * elements,
        "bwd_flops": 14 * elements,
    }


# --- operator

_fwd = define_op("layer_norm_fwd", launch=launch_fwd, reference=reference_fwd)
_add_fwd = define_op("add_layer_norm_fwd", launch=launch_add_fwd, reference=reference_add_fwd)
_bwd = define_op("layer_norm_bwd", launch=launch_bwd, reference=reference_bwd)


def _save(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.has_bias = bias is not None
    # Nobody differentiates mean and rstd: no zeros for their gradients.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)


def _grad(ctx, dy, _dmean, _drstd):
    if dy is None:
        return None, None, None, None
    dx, dw, db = _bwd(as_rows(dy), None, *ctx.saved_tensors, ctx.has_bias)
    return dx, dw, db if ctx.has_bias else None, None


def _save_add(ctx, inputs, output):
    x, residual, weight, bias, _ = inputs
    _, h, mean, rstd = output
    ctx.has_bias, ctx.dtypes = bias is not None, (x.dtype, residual.dtype)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, mean, rstd)


def _grad_add(ctx, dy, dh, _dmean, _drstd):
    if dy is None and dh is None:
        return None, None, None, None, None
    dy = torch.zeros_like(dh) if dy is None else as_rows(dy)
    dx, dw, db = _bwd(dy, None if dh is None else as_rows(dh), *ctx.saved_tensors, ctx.has_bias)
    return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dw, db if ctx.has_bias else None, None


_fwd.register_autograd(_grad, setup_context=_save)
_add_fwd.register_autograd(_grad_add, setup_context=_save_add)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{name}: x must be (..., N) with N from 1 to {MAX_WIDTH}, got {tuple(x.shape)}; reshape it")
    for label, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: {label} must be ({x.shape[-1]},) to match x {tuple(x.shape)}, got {tuple(vector.shape)}; "
                "pass one value for each element of the last axis"
            )
        if vector.device != x.device:
            raise ValueError(f"{name}: {label} must be on {x.device} like x, got {vector.device}; move it")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"{name}: bias must be {weight.dtype} like weight, got {bias.dtype}; cast it")
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"{name}: x and weight must be floating point, got {x.dtype} and {weight.dtype}; cast them")


@public
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Center each vector along the last axis and scale it to unit variance, then apply `weight` and `bias`.

    Args:
        x: (..., N), float32, bfloat16 or float16 (float64 on the CPU too), N up to 65,536, any layout.
        weight: (N,), any float dtype, device of x.
        bias: (N,), dtype of weight, or None.
        eps: added to the variance; in units of x squared.
    Returns: (..., N), dtype of x.
    Raises: ValueError if weight or bias is not (N,), is on another device or of another dtype than documented. TypeError for
        float64 on a GPU.
    """
    _check("layer_norm", x, weight, bias)
    y, _, _ = _fwd(as_rows(x), weight.contiguous(), None if bias is None else bias.contiguous(), eps)
    return like_rows_of(x, y)


@public
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add `residual` to `x` and normalize the sum, in one pass over memory.

    Args:
        x: (..., N), as for layer_norm: a block's output.
        residual: shape and device of x, any float dtype: the residual stream.
        weight, bias, eps: as for layer_norm.
    Returns: (y, h): h = x + residual in their common dtype, y = layer_norm(h, weight, bias) in the dtype of x.
    Raises: as layer_norm, and ValueError if residual differs from x in shape or device.
    """
    _check("add_layer_norm", x, weight, bias)
    if residual.shape != x.shape or residual.device != x.device or not residual.is_floating_point():
        raise ValueError(
            f"add_layer_norm: residual must be floating point, {tuple(x.shape)} on {x.device} like x, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )
    bias = None if bias is None else bias.contiguous()
    y, h, _, _ = _add_fwd(as_rows(x), as_rows(residual), weight.contiguous(), bias, eps)
    return like_rows_of(x, y), like_rows_of(x, h)
