"""The kernels of layer_norm and rms_norm for rows that stay in registers; wider ones: _layer_norm_wide.py.

Optional inputs and outputs are None. Without a mean the rows are not centered, which is what rms_norm is. Math, shapes and
precision are layer_norm.py's and rms_norm.py's.
"""

from ..core.triton import tl, triton

# --- kernels: a program owns BLOCK_M whole rows (forward), or every P-th such block of rows (backward)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_residual_m,
    M, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]

    h = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    if residual_ptr is not None:
        residual = tl.load(
            residual_ptr + offs_m[:, None] * stride_residual_m + offs_n[None, :],
            mask=mask,
            other=0.0,
        )
        rounded = (h + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offs_m[:, None] * N + offs_n[None, :], rounded, mask=mask)
        h = rounded.to(tl.float32)

    centered = h
    if mean_ptr is not None:
        mean = tl.sum(h, axis=1) / N
        centered = tl.where(mask, h - mean[:, None], 0.0)
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / N + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_partial_ptr, db_partial_ptr,
    stride_dym, stride_dhm, stride_hm,
    M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
        dy = tl.load(
            dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)

        # dy, and so g, is zero where masked: what xhat holds there never counts.
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
            dh = tl.load(
                dh_ptr + offs_m[:, None] * stride_dhm + offs_n[None, :], mask=mask, other=0.0
            )
            dx += dh.to(tl.float32)
        tl.store(
            dx_ptr + offs_m[:, None] * N + offs_n[None, :],
            dx.to(dx_ptr.dtype.element_ty),
            mask=mask,
        )
        dw += dy * xhat
        if db_partial_ptr is not None:
            db += dy

    partial = pid.to(tl.int64) * N + offs_n
    tl.store(dw_partial_ptr + partial, tl.sum(dw, axis=0), mask=mask_n)
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + partial, tl.sum(db, axis=0), mask=mask_n)
