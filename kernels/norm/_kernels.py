"""Kernels of layer_norm and rms_norm for rows that fit into registers.

Rows wider than MAX_RESIDENT_WIDTH have kernels of their own in _wide_kernels.py. layer_norm.py and
rms_norm.py give math, shapes and precision. A pointer of an optional input or output may be None:

    mean_ptr is None                       rows are not centered: rms_norm
    residual_ptr and h_ptr are None        no residual is added
    dh_ptr is None                         no gradient reached h itself
    weight_ptr, dw_partial_ptr are None    no weight
    bias_ptr, db_partial_ptr are None      no bias
    dadded_partial_ptr is None             no gradient of added_bias
    seed_ptr, threshold, scale are None    no dropout of x
    dresidual_ptr is None                  without dropout it equals dx
"""

from ..core.dropout import kept_tile
from ..core.triton import tl, triton


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_residual_m,
    M, N, eps, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes BLOCK_M rows. BLOCK_N is at least N."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]

    # h = z x + residual, rounded to the dtype in which the caller gets it.
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :]
    h = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        kept = kept_tile(tl.load(seed_ptr), offs_m, 0, N, threshold, BLOCK_M, BLOCK_N)
        h = tl.where(kept, h * scale, 0.0)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_residual_m + offs_n[None, :]
        residual = tl.load(residual_ptrs, mask=mask, other=0.0)
        rounded = (h + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
        h_ptrs = h_ptr + offs_m[:, None] * N + offs_n[None, :]  # h and y are contiguous
        tl.store(h_ptrs, rounded, mask=mask)
        h = rounded.to(tl.float32)

    # Statistics of each row. Masked elements are 0 in both sums.
    centered = h
    if mean_ptr is not None:
        mean = tl.sum(h, axis=1) / N
        centered = tl.where(mask, h - mean[:, None], 0.0)
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / N + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    # Scale and shift. A load after the multiplication takes two more registers on sm_100.
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y = centered * rstd[:, None] * weight[None, :]
    else:
        y = centered * rstd[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fold(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the second half of a tile's rows to the first half. A single row stays as it is."""
    if BLOCK_M == 1:
        return x
    else:
        return tl.sum(x.reshape(2, BLOCK_M // 2, BLOCK_N), axis=0)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dx_ptr, dresidual_ptr,
    dw_partial_ptr, db_partial_ptr, dadded_partial_ptr,
    stride_dym, stride_dhm, stride_hm,
    M, N, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p of P owns blocks p, p + P, p + 2 P ... of BLOCK_M rows.

    It writes dx and dresidual of its rows, and one row of partial sums each of dw, db and the
    columns of dx. Without dropout dx is also the gradient of the residual. If STAGES is 2 or
    more, the next STAGES - 1 blocks of dy, h and dh are loaded while this one is computed.
    """
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    # Each thread has elements of both halves of a tile. So _fold moves no data between threads, and
    # the sums take half of the registers.
    ROWS: tl.constexpr = (BLOCK_M + 1) // 2
    dw = tl.zeros((ROWS, BLOCK_N), tl.float32)
    db = tl.zeros((ROWS, BLOCK_N), tl.float32)
    dadded = tl.zeros((ROWS, BLOCK_N), tl.float32)
    programs = tl.num_programs(0)
    for block in tl.range(pid, tl.cdiv(M, BLOCK_M), programs, num_stages=STAGES):
        offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :]
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)

        # Masked elements of xhat may differ from 0. They add nothing to a sum, because each sum
        # multiplies them by dy or g, which are 0 there.
        g = dy
        if weight_ptr is not None:
            g = dy * weight[None, :]
        if mean_ptr is not None:
            h -= tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        xhat = h * rstd[:, None]
        centered = g
        if mean_ptr is not None:
            centered = g - (tl.sum(g, axis=1) / N)[:, None]
        mean_gx = tl.sum(g * xhat, axis=1) / N
        dx = (centered - xhat * mean_gx[:, None]) * rstd[:, None]
        if dh_ptr is not None:
            dh_ptrs = dh_ptr + offs_m[:, None] * stride_dhm + offs_n[None, :]
            dx += tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
        if seed is not None:
            dresidual_ptrs = dresidual_ptr + offs_m[:, None] * N + offs_n[None, :]
            tl.store(dresidual_ptrs, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
            kept = kept_tile(seed, offs_m, 0, N, threshold, BLOCK_M, BLOCK_N)
            dx = tl.where(kept, dx * scale, 0.0)
        dx_ptrs = dx_ptr + offs_m[:, None] * N + offs_n[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)

        # Add this block, folded to ROWS rows. tl.sum adds up these rows after the loop.
        if dw_partial_ptr is not None:
            dw += _fold(dy * xhat, BLOCK_M, BLOCK_N)
        if db_partial_ptr is not None:
            db += _fold(dy, BLOCK_M, BLOCK_N)
        if dadded_partial_ptr is not None:
            # dx is 0 in masked rows, because rstd and dh are 0 there.
            dadded += _fold(dx, BLOCK_M, BLOCK_N)

    partial_offs = pid.to(tl.int64) * N + offs_n
    if dw_partial_ptr is not None:
        tl.store(dw_partial_ptr + partial_offs, tl.sum(dw, axis=0), mask=mask_n)
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + partial_offs, tl.sum(db, axis=0), mask=mask_n)
    if dadded_partial_ptr is not None:
        tl.store(dadded_partial_ptr + partial_offs, tl.sum(dadded, axis=0), mask=mask_n)
