"""Kernels of layer_norm and rms_norm for rows too wide for registers, read in tiles of BLOCK_N.

The forward reads a row three times (mean, variance, output), or twice without a mean. The backward
reads it twice. Reads after the first mostly hit the L2 cache. Optional pointers may be None, as in
_kernels.py.
"""

from ..core.dropout import kept_tile
from ..core.triton import tl, triton


@triton.jit
def _kept_row(seed, row, first_column, N, threshold, BLOCK_N: tl.constexpr):
    """Return True for the elements to keep among BLOCK_N elements of a row."""
    rows = row + tl.arange(0, 1)
    return kept_tile(seed, rows, first_column, N, threshold, 1, BLOCK_N).reshape(BLOCK_N)


@triton.jit
def _layer_norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_residual_m,
    N, eps, threshold, scale,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes one row."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * N
    if residual_ptr is not None:
        residual_ptr += row * stride_residual_m
        h_ptr += row * N

    # First pass: h = z x + residual, rounded to the dtype in which the caller gets it; its sums.
    total = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        h = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            kept = _kept_row(tl.load(seed_ptr), row, start, N, threshold, BLOCK_N)
            h = tl.where(kept, h * scale, 0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            rounded = (h + residual).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + offs_n, rounded, mask=mask_n)
            h = rounded.to(tl.float32)
        total += h
        squares += h * h
    if residual_ptr is not None:
        # In the passes below, a thread may read an element of h that another thread wrote.
        tl.debug_barrier()
        source_ptr = h_ptr
    else:
        source_ptr = x_ptr

    # Second pass: squares of the centered row. The squares above lose digits if the mean is large.
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.sum(total, axis=0) / N
        tl.store(mean_ptr + row, mean)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            h = tl.load(source_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            centered = tl.where(offs_n < N, h - mean, 0.0)
            squares += centered * centered
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / N + eps)
    tl.store(rstd_ptr + row, rstd)

    # Last pass: scale and shift.
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        h = tl.load(source_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y = (h - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_bwd_wide_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dx_ptr, dresidual_ptr,
    dw_partial_ptr, db_partial_ptr, dadded_partial_ptr,
    stride_dym, stride_dhm, stride_hm,
    M, N, threshold, scale,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program p of P owns rows p, p + P, p + 2 P ...

    It writes dx and dresidual of its rows. In memory, it adds to one row of partial sums each of
    dw, db and the columns of dx. Without dropout dx is also the gradient of the residual.
    """
    pid = tl.program_id(0)
    if dw_partial_ptr is not None:
        dw_partial_ptr += pid.to(tl.int64) * N
    if db_partial_ptr is not None:
        db_partial_ptr += pid.to(tl.int64) * N
    if dadded_partial_ptr is not None:
        dadded_partial_ptr += pid.to(tl.int64) * N
    for block in range(pid, M, tl.num_programs(0)):
        row = tl.cast(block, tl.int64)
        mean = tl.load(mean_ptr + row) if mean_ptr is not None else 0.0
        rstd = tl.load(rstd_ptr + row)

        # First pass: means of g and of g xhat.
        sum_g = tl.zeros((BLOCK_N,), tl.float32)
        sum_gx = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            g = tl.load(dy_ptr + row * stride_dym + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + row * stride_hm + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            sum_g += g
            sum_gx += g * (h - mean) * rstd
        mean_g = tl.sum(sum_g, axis=0) / N if mean_ptr is not None else 0.0
        mean_gx = tl.sum(sum_gx, axis=0) / N

        # Second pass: dx, and this row's terms of the sums.
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            dy = tl.load(dy_ptr + row * stride_dym + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            g = dy
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + row * stride_hm + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            xhat = (h - mean) * rstd
            dx = (g - mean_g - xhat * mean_gx) * rstd
            if dh_ptr is not None:
                dh = tl.load(dh_ptr + row * stride_dhm + offs_n, mask=mask_n, other=0.0)
                dx += dh.to(tl.float32)
            if seed_ptr is not None:
                dresidual = dx.to(dresidual_ptr.dtype.element_ty)
                tl.store(dresidual_ptr + row * N + offs_n, dresidual, mask=mask_n)
                # Loading the seed before the loops spills more scalar registers on gfx942.
                kept = _kept_row(tl.load(seed_ptr), row, start, N, threshold, BLOCK_N)
                dx = tl.where(kept, dx * scale, 0.0)
            tl.store(dx_ptr + row * N + offs_n, dx.to(dx_ptr.dtype.element_ty), mask=mask_n)

            # No barrier is needed: only this program uses its row of partial sums, and each thread
            # reads only elements that it wrote itself. For the first row the sums start at 0.
            mask_old = mask_n & (block != pid)
            if dw_partial_ptr is not None:
                dw = tl.load(dw_partial_ptr + offs_n, mask=mask_old, other=0.0) + dy * xhat
                tl.store(dw_partial_ptr + offs_n, dw, mask=mask_n)
            if db_partial_ptr is not None:
                db = tl.load(db_partial_ptr + offs_n, mask=mask_old, other=0.0) + dy
                tl.store(db_partial_ptr + offs_n, db, mask=mask_n)
            if dadded_partial_ptr is not None:
                dadded = tl.load(dadded_partial_ptr + offs_n, mask=mask_old, other=0.0) + dx
                tl.store(dadded_partial_ptr + offs_n, dadded, mask=mask_n)
