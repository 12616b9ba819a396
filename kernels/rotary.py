"""Rotary position embedding (RoPE): rotate each pair of a head's elements by its token's angle.

    forward    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin
    backward   dx1 = dy1 cos + dy2 sin     dx2 = dy2 cos - dy1 sin     (the forward with -sin)
    pairs      x1, x2 are elements i and i + K / 2 of a head (Llama, GPT-NeoX);
               interleaved: elements 2 i and 2 i + 1 (the paper, GPT-J)
    partial    only the first R elements of a head are rotated; the pairs are then elements i and
               i + R / 2. The others are copied (GPT-NeoX, GPT-J, Phi)

Shapes     x, y: (B, T, H, K)   cos, sin: (S, R / 2) with S >= T, or (B, T, R / 2)   R <= K
Precision  any float dtype in, the same dtype out; arithmetic in float32
Cost       memory-bound: x is read once, y is written once; cost() gives bytes and FLOPs
Source     Su et al. 2021, arXiv:2104.09864

This file is the template for a new kernel. Copy it, then replace the parts in their order.
"""

import torch
from torch import Tensor

from .core.launch import launch_kernel
from .core.layout import strides_bth, unit_stride, wide
from .core.op import define_op, public
from .core.rope import as_tables, check_tables
from .core.triton import cdiv, next_power_of_2, tl, triton

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, is_reversed: bool
) -> Tensor:
    """Rotate the pairs of x by the angles, or by the negated angles if `is_reversed`.

    The angles rotate the first R elements of each head. The other elements are copied.
    """
    # `wide` gives at least float32. float64 stays, so that gradcheck can test the math.
    T, K, R = x.shape[1], x.shape[3], 2 * cos.shape[-1]
    cos, sin = (wide(table[..., :T, :]).unsqueeze(-2) for table in (cos, sin))  # (..., T, 1, R / 2)
    if is_reversed:
        sin = -sin
    x, rest = x.split_with_sizes((R, K - R), -1)
    if interleaved:
        x1, x2 = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
        # A flattened stack would be a view, which autograd does not let callers change in place.
        y = x.new_empty(x.shape)
        y[..., ::2] = x1 * cos - x2 * sin
        y[..., 1::2] = x2 * cos + x1 * sin
    else:
        x1, x2 = wide(x).chunk(2, -1)
        y = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)
    return y if R == K else torch.cat((y, rest), -1)


# --- kernel: one program rotates BLOCK_M of the M = B T H heads, numbered in the order of y


@triton.jit(do_not_specialize=["M", "T"])
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,  # inputs, then outputs
    # Strides in the order of the pointers. y is contiguous, and all last strides are 1: not passed.
    stride_xb, stride_xt, stride_xh, stride_cosb, stride_cost, stride_sinb, stride_sint,
    M, T, H, sign,  # sizes, then scalars
    # Each value compiles a kernel of its own. The first ROTATED of HEAD elements are rotated.
    IS_INTERLEAVED: tl.constexpr, HEAD: tl.constexpr, ROTATED: tl.constexpr,
    # Tile: heads, pairs, elements that are copied; powers of two.
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    # int64 before a stride multiplies: a tensor of 2^31 elements or more would overflow int32.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = offs_m // H, offs_m % H
    batch, t = token // T, token % T
    offs_p = tl.arange(0, BLOCK_P)

    # The last tile may reach past M, and BLOCK_P past ROTATED / 2: masked elements are never
    # accessed.
    mask_m, mask_p = offs_m < M, offs_p < ROTATED // 2
    mask = mask_m[:, None] & mask_p[None, :]

    # Load the angles. All heads of a token use the same ones: repeated loads hit the cache.
    cos_ptrs = cos_ptr + (batch * stride_cosb + t * stride_cost)[:, None] + offs_p[None, :]
    sin_ptrs = sin_ptr + (batch * stride_sinb + t * stride_sint)[:, None] + offs_p[None, :]
    cos = tl.load(cos_ptrs, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptrs, mask=mask, other=0.0).to(tl.float32) * sign

    # Rotate. Arithmetic is in float32; the store rounds once to the dtype of y.
    x_ptr += (batch * stride_xb + t * stride_xt + head * stride_xh)[:, None]
    y_ptr += (offs_m * HEAD)[:, None]
    if IS_INTERLEAVED:
        # Load neighbours together: separate loads of x1 and x2 would have a stride of 2.
        offs_k = tl.arange(0, 2 * BLOCK_P)
        mask_k = mask_m[:, None] & (offs_k < ROTATED)[None, :]
        x = tl.load(x_ptr + offs_k[None, :], mask=mask_k, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_P, 2)))
        y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        y = tl.reshape(y, (BLOCK_M, 2 * BLOCK_P)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_k[None, :], y, mask=mask_k)
    else:
        x1 = tl.load(x_ptr + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + ROTATED // 2 + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
        y1 = (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty)
        y2 = (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_p[None, :], y1, mask=mask)
        tl.store(y_ptr + ROTATED // 2 + offs_p[None, :], y2, mask=mask)

    # Copy the other elements of the head.
    if ROTATED < HEAD:
        offs_k = ROTATED + tl.arange(0, BLOCK_REST)
        mask_k = mask_m[:, None] & (offs_k < HEAD)[None, :]
        rest = tl.load(x_ptr + offs_k[None, :], mask=mask_k, other=0.0)
        tl.store(y_ptr + offs_k[None, :], rest, mask=mask_k)


# --- launcher: allocate, plan, launch by keyword; no checks, no autograd

# Elements of a tile: 16 for each of the 128 threads of a program.
TILE_ELEMENTS = 2_048


def plan(M: int, K: int, R: int) -> tuple[int, int, int]:
    """Choose the tile for M heads of K elements, R of them rotated.

    Returns heads per program, pairs per head, and copied elements per head.

    A function of sizes alone, so that tests call it without a GPU.
    """
    block_p, block_rest = next_power_of_2(R // 2), next_power_of_2(max(1, K - R))
    block_m = min(TILE_ELEMENTS // next_power_of_2(K), next_power_of_2(M))
    return max(1, block_m), block_p, block_rest


def launch_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, is_reversed: bool
) -> Tensor:
    """Run the kernel. The signature is that of `reference_rotary`; define_op checks that."""
    B, T, H, K = x.shape
    M = B * T * H
    y = torch.empty((B, T, H, K), dtype=x.dtype, device=x.device)
    R = 2 * cos.shape[-1]
    block_m, block_p, block_rest = plan(M, K, R)
    # A table without a batch axis gets one of stride 0: all sequences read the same rows.
    cos, sin = (table.expand(B, *table.shape[-2:]) for table in (cos, sin))
    launch_kernel(_rotary_kernel, (cdiv(M, block_m),),
        x_ptr=x, cos_ptr=cos, sin_ptr=sin, y_ptr=y, **strides_bth(x=x),
        stride_cosb=cos.stride(0), stride_cost=cos.stride(1),
        stride_sinb=sin.stride(0), stride_sint=sin.stride(1),
        M=M, T=T, H=H, sign=-1.0 if is_reversed else 1.0,
        IS_INTERLEAVED=interleaved, HEAD=K, ROTATED=R,
        BLOCK_M=block_m, BLOCK_P=block_p, BLOCK_REST=block_rest,
    )  # fmt: skip
    return y


def cost(M: int, K: int, itemsize: int) -> dict[str, int]:
    """Return the least bytes to move and the FLOPs, forward and backward.

    For M heads of K elements of `itemsize` bytes, all rotated. The tables are small and not
    counted.
    """
    moved_bytes = 2 * M * K * itemsize
    flops = 3 * M * K
    return {
        "fwd_bytes": moved_bytes,
        "bwd_bytes": moved_bytes,
        "fwd_flops": flops,
        "bwd_flops": flops,
    }


# --- operator: the dispatcher chooses launch or reference by the device of the tensors

_rotary = define_op("rotary", launch=launch_rotary, reference=reference_rotary)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.is_reversed = inputs
    ctx.save_for_backward(cos, sin)  # a rotation is linear: its gradient does not need x


def _grad(ctx, dy):
    # The transpose of a rotation is its inverse. The gradient is therefore the same operator with
    # negated angles, and it can be differentiated again.
    dy = unit_stride(dy)
    dx = _rotary(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.is_reversed)
    return dx, None, None, None, None  # one gradient per argument; tables and flags get none


_rotary.register_autograd(_grad, setup_context=_save)


@public  # checks the type of each argument
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate each pair of a head's elements by the angle of its token's position.

    Row t of the tables holds the angles of token t. To start at a later position, slice the
    tables: rotary(x, cos[past:], sin[past:]). To restart positions inside a sequence, pass a row
    for each token: cos[position] and sin[position], (B, T, R / 2).

    Args:
        x: (B, T, H, K), K even, float32, bfloat16 or float16 (float64 on a CPU too), any layout.
        cos, sin: (S, R / 2) with S >= T, or (B, T, R / 2); R <= K; any float dtype, device of x.
            The first R elements of each head are rotated, the others are copied. The tables get
            no gradient.
        interleaved: pair elements 2 i and 2 i + 1; else elements i and i + R / 2.
    Returns: (B, T, H, K), dtype of x, contiguous.
    Raises:
        ValueError: x is not (B, T, H, K) with K even, or a table does not match x or requires a
            gradient.
        TypeError: x is float64 on a GPU.
    """
    _check(x, cos, sin)
    cos, sin = as_tables(cos, sin, x.dtype)
    return _rotary(unit_stride(x), cos, sin, interleaved, False)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise a ValueError unless the tables match x. Only metadata is read, never a value."""
    if x.ndim != 4 or x.shape[-1] < 2 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            "rotary: x must be floating point (B, T, H, K) with K even, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    K = x.shape[-1]
    pairs = cos.shape[-1] if cos.ndim and 1 <= cos.shape[-1] <= K // 2 else K // 2
    check_tables("rotary", cos, sin, pairs, x, "x")
