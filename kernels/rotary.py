"""Rotary position embedding: each pair of a head's numbers is turned by an angle that grows with the token's position.

    forward    y1 = x1 cos - x2 sin      y2 = x2 cos + x1 sin
    backward   the same with the angle reversed: dx1 = dy1 cos + dy2 sin    dx2 = dy2 cos - dy1 sin
    pairs      number i and i + K / 2 of a head (Llama, GPT-NeoX), or "interleaved": 2 i and 2 i + 1 (the paper, GPT-J)

Shapes     x, y: (B, T, H, K)   cos, sin: (S, K / 2) with S >= T, row t for token t of every sequence, or (B, T, K / 2)
Precision  any float dtype in, y in the same; products and sums in float32
Cost       memory-bound: x read, y written, the tables once for all heads; see cost()
Source     Su et al. 2021, arXiv:2104.09864
"""

import torch
from torch import Tensor

from .core.layout import strides_bth, wide
from .core.op import define_op, public
from .core.triton import cdiv, next_power_of_2, tl, triton

# Numbers of a program's tile: 16 for each of 128 threads.
TILE_ELEMENTS = 2_048


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, is_reversed: bool
) -> Tensor:
    """Turn the pairs of x by the angles, or back."""
    T = x.shape[1]
    cos, sin = (wide(table if table.ndim == 3 else table[:T]).unsqueeze(-2) for table in (cos, sin))
    if is_reversed:
        sin = -sin
    x1, x2 = wide(x).unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide(x).chunk(2, -1)
    y = torch.stack if interleaved else torch.cat
    return y((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).reshape(x.shape).to(x.dtype)


# --- kernel: a program owns BLOCK_M of the B T H heads, in their order


@triton.jit
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    stride_xb, stride_xt, stride_xh, stride_cosb, stride_cost, stride_sinb, stride_sint,
    M, T, H, sign,
    IS_INTERLEAVED: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = offs_m // H, offs_m % H
    batch, t = token // T, token % T
    offs_p = tl.arange(0, BLOCK_P)
    mask_m, mask_p = offs_m < M, offs_p < HEAD // 2
    mask = mask_m[:, None] & mask_p[None, :]
    cos = tl.load(
        cos_ptr + (batch * stride_cosb + t * stride_cost)[:, None] + offs_p[None, :],
        mask=mask,
        other=0.0,
    )
    sin = tl.load(
        sin_ptr + (batch * stride_sinb + t * stride_sint)[:, None] + offs_p[None, :],
        mask=mask,
        other=0.0,
    )
    cos, sin = cos.to(tl.float32), sin.to(tl.float32) * sign
    x_ptr += (batch * stride_xb + t * stride_xt + head * stride_xh)[:, None]
    y_ptr += (offs_m * HEAD)[:, None]
    if IS_INTERLEAVED:
        offs_k = tl.arange(0, 2 * BLOCK_P)
        mask_k = mask_m[:, None] & (offs_k < HEAD)[None, :]
        x = tl.load(x_ptr + offs_k[None, :], mask=mask_k, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_P, 2)))
        y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        y = tl.reshape(y, (BLOCK_M, 2 * BLOCK_P)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_k[None, :], y, mask=mask_k)
    else:
        x1 = tl.load(x_ptr + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + HEAD // 2 + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(
            y_ptr + offs_p[None, :], (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask
        )
        tl.store(
            y_ptr + HEAD // 2 + offs_p[None, :],
            (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty),
            mask=mask,
        )


# --- launcher: allocate, plan, launch by keyword


def plan(M: int, K: int) -> tuple[int, int]:
    """Choose how many of M heads of K numbers a program owns, and how many pairs its tile has for each."""
    pairs = next_power_of_2(K // 2)
    return max(1, min(TILE_ELEMENTS // (2 * pairs), next_power_of_2(M))), pairs


def launch_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, is_reversed: bool
) -> Tensor:
    """Kernel counterpart of `reference_rotary`."""
    B, T, H, K = x.shape
    y = torch.empty((B, T, H, K), dtype=x.dtype, device=x.device)
    block_m, pairs = plan(B * T * H, K)
    tables = {
        f"stride_{name}{axis}": stride
        for name, table in (("cos", cos), ("sin", sin))
        for axis, stride in zip(
            "bt", table.stride()[:2] if table.ndim == 3 else (0, table.stride(0)), strict=True
        )
    }
    _rotary_kernel[(cdiv(B * T * H, block_m),)](
        x_ptr=x, cos_ptr=cos, sin_ptr=sin, y_ptr=y, **strides_bth(x=x), **tables,
        M=B * T * H, T=T, H=H, sign=-1.0 if is_reversed else 1.0,
        IS_INTERLEAVED=interleaved, HEAD=K, BLOCK_M=block_m, BLOCK_P=pairs,
    )  # fmt: skip
    return y


def cost(M: int, K: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move, forward and backward, and FLOPs, for M heads of K numbers of `itemsize` bytes; tables left out."""
    return {
        "fwd_bytes": 2 * M * K * itemsize,
        "bwd_bytes": 2 * M * K * itemsize,
        "fwd_flops": 3 * M * K,
        "bwd_flops": 3 * M * K,
    }


# --- operator

_rotary = define_op("rotary", launch=launch_rotary, reference=reference_rotary)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.is_reversed = inputs
    ctx.save_for_backward(cos, sin)


def _grad(ctx, dy):
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    return (
        _rotary(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.is_reversed),
        None,
        None,
        None,
        None,
    )


_rotary.register_autograd(_grad, setup_context=_save)


@public
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn each head's pairs of numbers by the angles of its token's position.

    A later position begins further down the tables: rotary(x, cos[past:], sin[past:]). Documents that begin anew within a
    sequence take rows of their own: cos[position] (B, T, K / 2).

    Args:
        x: (B, T, H, K), K even, float32, bfloat16 or float16 (float64 on the CPU too), any layout.
        cos, sin: (S, K / 2) with S at least T, or (B, T, K / 2); any float dtype, device of x. They get no gradient.
        interleaved: pairs are neighbours; else number i and i + K / 2.
    Returns: (B, T, H, K), dtype of x, contiguous.
    Raises: ValueError if K is odd, or if a table does not match x, has fewer rows than x has tokens, or needs a gradient;
        TypeError for float64 x on a GPU.
    """
    if x.ndim != 4 or x.shape[-1] < 2 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"rotary: x must be floating point (B, T, H, K) with K even, got {x.dtype} {tuple(x.shape)}"
        )
    B, T, _, K = x.shape
    for label, table in (("cos", cos), ("sin", sin)):
        fits = table.shape == (B, T, K // 2) or (
            table.ndim == 2 and table.shape[0] >= T and table.shape[1] == K // 2
        )
        if not fits or not table.is_floating_point():
            raise ValueError(
                f"rotary: {label} must be floating point ({T} or more, {K // 2}) or ({B}, {T}, {K // 2}) to match "
                f"x {tuple(x.shape)}, got {table.dtype} {tuple(table.shape)}; make longer tables"
            )
        if table.device != x.device:
            raise ValueError(
                f"rotary: {label} must be on {x.device} like x, got {table.device}; move it"
            )
        if table.requires_grad:
            raise ValueError(
                f"rotary: {label} must not need a gradient, got one that does; detach it"
            )
    if x.dtype != torch.float64:
        # Kernels take no float64, and would not gain by it.
        cos, sin = (
            table.float() if table.dtype == torch.float64 else table for table in (cos, sin)
        )
    x, cos, sin = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cos, sin)
    )
    return _rotary(x, cos, sin, interleaved, False)
