"""Kernels of QK-norm and RoPE. _norm_rope.py has the math, the shapes and the launchers.

A tile is BLOCK_H heads of BLOCK_T tokens. Its rows are heads. The heads of a token are adjacent
rows, so that repeated loads of the token's angles hit the L1 cache. A head is loaded in halves of
up to BLOCK_P elements, because RoPE pairs elements of both.
"""

from ..core.triton import tl, triton


@triton.jit
def _rows(block, first_head, N, heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Return token, head and mask of each row of a tile, (BLOCK_T BLOCK_H,)."""
    rows = tl.arange(0, BLOCK_T * BLOCK_H)
    # int64 before a stride multiplies: a tensor of 2^31 elements or more would overflow int32.
    token = (block * BLOCK_T + rows // BLOCK_H).to(tl.int64)
    head = first_head + rows % BLOCK_H
    return token, head, (token < N) & (head < heads)


@triton.jit
def _load_halves(head_ptrs, mask_m, HEAD: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load the first and the second half of heads (rows, 1) as float32. Masked elements are 0.

    If HEAD is odd, the first half has the element in the middle.
    """
    FIRST: tl.constexpr = (HEAD + 1) // 2
    offs_p = tl.arange(0, BLOCK_P)[None, :]
    x1 = tl.load(head_ptrs + offs_p, mask=mask_m & (offs_p < FIRST), other=0.0)
    x2 = tl.load(head_ptrs + FIRST + offs_p, mask=mask_m & (offs_p < HEAD - FIRST), other=0.0)
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def _store_halves(head_ptrs, x1, x2, mask_m, HEAD: tl.constexpr, BLOCK_P: tl.constexpr):
    """Store what _load_halves loads."""
    FIRST: tl.constexpr = (HEAD + 1) // 2
    offs_p = tl.arange(0, BLOCK_P)[None, :]
    dtype = head_ptrs.dtype.element_ty
    tl.store(head_ptrs + offs_p, x1.to(dtype), mask=mask_m & (offs_p < FIRST))
    tl.store(head_ptrs + FIRST + offs_p, x2.to(dtype), mask=mask_m & (offs_p < HEAD - FIRST))


@triton.jit
def _load_weights(
    q_weight_ptr, k_weight_ptr, is_query, mask_m, HEAD: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Load both halves of the gain of each row's head."""
    q1, q2 = _load_halves(q_weight_ptr, mask_m & is_query, HEAD, BLOCK_P)
    k1, k2 = _load_halves(k_weight_ptr, mask_m & ~is_query, HEAD, BLOCK_P)
    # One of the two is 0.
    return q1 + k1, q2 + k2


@triton.jit
def _load_angles(
    cos_ptr, sin_ptr, stride_cosb, stride_cost, stride_sinb, stride_sint, token, T, mask_m,
    HEAD: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Load cosines and sines of each row's token as float32."""
    batch, t = token // T, token % T
    offs_p = tl.arange(0, BLOCK_P)[None, :]
    mask = mask_m & (offs_p < HEAD // 2)
    cos_ptrs = cos_ptr + (batch * stride_cosb + t * stride_cost)[:, None] + offs_p
    sin_ptrs = sin_ptr + (batch * stride_sinb + t * stride_sint)[:, None] + offs_p
    cos = tl.load(cos_ptrs, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _head_rstd(x1, x2, eps, HEAD: tl.constexpr):
    """Return the reciprocal root mean square of each row, (rows, 1)."""
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
    return (1.0 / tl.sqrt(squares / HEAD + eps))[:, None]


@triton.jit(do_not_specialize=["N", "T"])
def _norm_rope_fwd_kernel(
    x_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, y_ptr,
    stride_xb, stride_xt, stride_cosb, stride_cost, stride_sinb, stride_sint,
    N, T, H, heads, eps,
    HEAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Transform one tile. Without norm the weights are None, without RoPE the tables."""
    tiles = tl.cdiv(heads, BLOCK_H)
    pid = tl.program_id(0)
    token, head, mask_m = _rows(pid // tiles, pid % tiles * BLOCK_H, N, heads, BLOCK_T, BLOCK_H)
    mask_m = mask_m[:, None]
    x_ptrs = x_ptr + (token // T * stride_xb + token % T * stride_xt + head * HEAD)[:, None]
    x1, x2 = _load_halves(x_ptrs, mask_m, HEAD, BLOCK_P)
    if q_weight_ptr is not None:
        is_query = (head < H)[:, None]
        w1, w2 = _load_weights(q_weight_ptr, k_weight_ptr, is_query, mask_m, HEAD, BLOCK_P)
        rstd = _head_rstd(x1, x2, eps, HEAD)
        x1 *= rstd * w1
        x2 *= rstd * w2
    y1, y2 = x1, x2
    if cos_ptr is not None:
        cos, sin = _load_angles(
            cos_ptr, sin_ptr, stride_cosb, stride_cost, stride_sinb, stride_sint, token, T, mask_m,
            HEAD, BLOCK_P,
        )  # fmt: skip
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
    y_ptrs = y_ptr + ((token * heads + head) * HEAD)[:, None]  # y is contiguous
    _store_halves(y_ptrs, y1, y2, mask_m, HEAD, BLOCK_P)


@triton.jit
def _store_sums(
    sums_ptrs, acc1, acc2, mask_h,
    HEAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store the sums over the tokens of a tile, for each of its heads."""
    sum1 = tl.sum(tl.reshape(acc1, (BLOCK_T, BLOCK_H, BLOCK_P)), axis=0)
    sum2 = tl.sum(tl.reshape(acc2, (BLOCK_T, BLOCK_H, BLOCK_P)), axis=0)
    _store_halves(sums_ptrs, sum1, sum2, mask_h, HEAD, BLOCK_P)


@triton.jit(do_not_specialize=["N", "T", "groups"])
def _norm_rope_bwd_kernel(
    dy_ptr, x_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    dx_ptr, dw_partial_ptr, dbias_partial_ptr,
    stride_dyt, stride_xb, stride_xt, stride_cosb, stride_cost, stride_sinb, stride_sint,
    N, T, H, heads, groups, eps,
    HEAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write dx over dy, which is the same memory, and sums over the tokens of this program.

    Program (group, tile of heads) owns blocks group, group + groups ... of BLOCK_T tokens. Without
    norm x, the weights and dw are None, without RoPE the tables, without a bias its sums.
    """
    tiles = tl.cdiv(heads, BLOCK_H)
    group = tl.program_id(0) // tiles
    first_head = tl.program_id(0) % tiles * BLOCK_H
    if q_weight_ptr is not None:
        _, head, _ = _rows(group, first_head, N, heads, BLOCK_T, BLOCK_H)
        is_query, is_head = (head < H)[:, None], (head < heads)[:, None]
        w1, w2 = _load_weights(q_weight_ptr, k_weight_ptr, is_query, is_head, HEAD, BLOCK_P)
    dw1 = tl.zeros((BLOCK_T * BLOCK_H, BLOCK_P), tl.float32)
    dw2 = tl.zeros((BLOCK_T * BLOCK_H, BLOCK_P), tl.float32)
    dbias1 = tl.zeros((BLOCK_T * BLOCK_H, BLOCK_P), tl.float32)
    dbias2 = tl.zeros((BLOCK_T * BLOCK_H, BLOCK_P), tl.float32)
    for block in range(group, tl.cdiv(N, BLOCK_T), groups):
        token, head, mask_m = _rows(block, first_head, N, heads, BLOCK_T, BLOCK_H)
        mask_m = mask_m[:, None]

        # Rotate back.
        offs = (token * stride_dyt + head * HEAD)[:, None]
        g1, g2 = _load_halves(dy_ptr + offs, mask_m, HEAD, BLOCK_P)
        if cos_ptr is not None:
            cos, sin = _load_angles(
                cos_ptr, sin_ptr, stride_cosb, stride_cost, stride_sinb, stride_sint, token, T,
                mask_m, HEAD, BLOCK_P,
            )  # fmt: skip
            dy1, dy2 = g1, g2
            g1 = dy1 * cos + dy2 * sin
            g2 = dy2 * cos - dy1 * sin

        # The gradient of the norm. In a masked row x is 0, so it adds nothing to a sum. rstd must
        # be 0 too: with eps = 0 it would be infinite, and 0 times infinity is NaN.
        if q_weight_ptr is not None:
            x_ptrs = x_ptr + (token // T * stride_xb + token % T * stride_xt + head * HEAD)[:, None]
            x1, x2 = _load_halves(x_ptrs, mask_m, HEAD, BLOCK_P)
            rstd = tl.where(mask_m, _head_rstd(x1, x2, eps, HEAD), 0.0)
            x1 *= rstd
            x2 *= rstd
            dw1 += g1 * x1
            dw2 += g2 * x2
            g1 *= w1
            g2 *= w2
            mean = (tl.sum(g1 * x1 + g2 * x2, axis=1) / HEAD)[:, None]
            g1 = (g1 - x1 * mean) * rstd
            g2 = (g2 - x2 * mean) * rstd
        _store_halves(dx_ptr + offs, g1, g2, mask_m, HEAD, BLOCK_P)
        if dbias_partial_ptr is not None:
            dbias1 += g1
            dbias2 += g2

    # Partial sums: dw (heads, groups, HEAD), dbias (groups, heads, HEAD).
    head = first_head + tl.arange(0, BLOCK_H)
    mask_h = (head < heads)[:, None]
    if dw_partial_ptr is not None:
        dw_ptrs = dw_partial_ptr + ((head * groups + group) * HEAD)[:, None]
        _store_sums(dw_ptrs, dw1, dw2, mask_h, HEAD, BLOCK_T, BLOCK_H, BLOCK_P)
    if dbias_partial_ptr is not None:
        dbias_ptrs = dbias_partial_ptr + ((group * heads + head) * HEAD)[:, None]
        _store_sums(dbias_ptrs, dbias1, dbias2, mask_h, HEAD, BLOCK_T, BLOCK_H, BLOCK_P)
