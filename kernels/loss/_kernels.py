"""The kernels of cross_entropy and linear_cross_entropy. A program owns BLOCK_M rows of logits and walks their columns.

Walking    tiles of UNROLL x BLOCK_V columns without masks, from a row's first address that is a multiple of 16 bytes, counted
           from where the tensor begins: a row that begins between two of them, as every other row of 50,257 columns does, is
           still loaded 16 bytes at a time. What is left of the row, before that address and behind the last whole tile, comes
           last, under a mask
Softmax    each lane keeps the maximum and the sum of the columns it has seen; lanes meet once, at the end of the row
Target     is left out of that sum: where it is the largest, log(1 + others) keeps the digits of the others, and so do the loss
           and p - 1 of the target, even where p is 1 but for a rounding
Rows       one whose target is ignored is not read; one whose target is no column has NaN for loss and gradient

Math, shapes and precision are cross_entropy.py's.
"""

from ..core.tile import tanh
from ..core.triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below no finite logit: differences from it are never NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _log1p(x):
    """log(1 + x) of x >= 0, to a few units in the last place: by 2 artanh(x / (2 + x)) where 1 + x would lose digits."""
    z = x / (2.0 + x)
    zz = z * z
    series = 1.0 + zz * (
        1 / 3 + zz * (1 / 5 + zz * (1 / 7 + zz * (1 / 9 + zz * (1 / 11 + zz * (1 / 13 + zz / 15)))))
    )
    return tl.where(x < 1.0, 2.0 * z * series, tl.log2(1.0 + x) * LN2)


@triton.jit
def _cap(x, softcap):
    return x if softcap is None else softcap * tanh(x / softcap)


@triton.jit
def _rows(target_ptr, ignore_index, N, V, BLOCK_M: tl.constexpr):
    """Row numbers, columns of the targets, which rows count, and which of those have a column."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + offs_m, mask=offs_m < N, other=ignore_index)
    counted = (offs_m < N) & (target != ignore_index)
    valid = counted & (target >= 0) & (target < V)
    # Compared with each column: 64 bits would take twice the instructions.
    return offs_m, tl.where(valid, target, 0).to(tl.int32), counted, valid


@triton.jit
def _split(offs_m, stride_m, V, TILE: tl.constexpr, VEC: tl.constexpr):
    """Columns before a row's first aligned address, and how many behind it fill whole tiles in all of the rows."""
    first = offs_m * stride_m
    lead = (tl.cdiv(first, VEC) * VEC - first).to(tl.int32)
    return lead, tl.maximum(V - tl.max(lead, axis=0), 0) // TILE * TILE


@triton.jit
def _tile_columns(UNROLL: tl.constexpr, BLOCK_V: tl.constexpr):
    """Columns of a tile of the body, counted from its first, (1, UNROLL, BLOCK_V)."""
    return tl.arange(0, UNROLL)[None, :, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, None, :]


@triton.jit
def _rest_columns(start, lead, body, BLOCK_V: tl.constexpr):
    """Columns of a tile of the rest, counted from the row's begin, (BLOCK_M, 1, BLOCK_V)."""
    offs = start + tl.arange(0, BLOCK_V)[None, None, :]
    return tl.where(offs < lead[:, None, None], offs, offs + body)


@triton.jit
def _aligned(ptr, offs_m, stride_m, VEC: tl.constexpr):
    """Pointers to the rows' first aligned addresses."""
    return ptr + (tl.cdiv(offs_m * stride_m, VEC) * VEC)[:, None, None]


@triton.jit
def _join(top, total, x):
    """Take the columns x (BLOCK_M, UNROLL, BLOCK_V) into each lane's maximum and sum of exponentials."""
    new_top = tl.maximum(top, tl.max(x, axis=1))
    total = total * _exp(top - new_top) + tl.sum(_exp(x - new_top[:, None, :]), axis=1)
    return new_top, total


@triton.jit
def _row_statistics(
    logits_ptr, stride_m, offs_m, target, counted, valid, V, softcap, label_smoothing,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Per row, (BLOCK_M,): its maximum; log sum_v exp(s_v - maximum); the target's s; sum_v s_v, if there is smoothing."""
    lead, body = _split(offs_m, stride_m, V, UNROLL * BLOCK_V, VEC)
    read = counted[:, None, None]
    top = tl.full((BLOCK_M, BLOCK_V), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    columns_sum = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)

    aligned_ptr = _aligned(logits_ptr, offs_m, stride_m, VEC)
    offs = _tile_columns(UNROLL, BLOCK_V)
    body_target = (target - lead)[:, None, None]
    for start in range(0, body, UNROLL * BLOCK_V):
        x = _cap(tl.load(aligned_ptr + start + offs, mask=read, other=0.0).to(tl.float32), softcap)
        if label_smoothing is not None:
            columns_sum += tl.sum(x, axis=1)
        top, total = _join(top, total, tl.where(offs == body_target - start, float("-inf"), x))
    row_ptr = logits_ptr + (offs_m * stride_m)[:, None, None]
    for start in range(0, V - body, BLOCK_V):
        columns = _rest_columns(start, lead, body, BLOCK_V)
        inside = columns < V
        x = _cap(tl.load(row_ptr + columns, mask=inside & read, other=0.0).to(tl.float32), softcap)
        if label_smoothing is not None:
            columns_sum += tl.sum(tl.where(inside, x, 0.0), axis=1)
        other = inside & (columns != target[:, None, None])
        top, total = _join(top, total, tl.where(other, x, float("-inf")))

    others_top = tl.max(top, axis=1)
    others = tl.sum(total * _exp(top - others_top[:, None]), axis=1)
    s = _cap(
        tl.load(logits_ptr + offs_m * stride_m + target, mask=valid, other=0.0).to(tl.float32),
        softcap,
    )
    row_top = tl.maximum(s, others_top)
    others *= _exp(others_top - row_top)
    log_sum = tl.where(s >= others_top, _log1p(others), tl.log2(others + _exp(s - row_top)) * LN2)
    return row_top, log_sum, s, tl.sum(columns_sum, axis=1)


@triton.jit
def _forward(
    logits_ptr, loss_ptr, stride_m, offs_m, target, counted, valid, N, V, softcap, label_smoothing, z_loss,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store each row's loss; return its maximum, log-sum-exp less that, and its target's s."""
    top, log_sum, s, columns_sum = _row_statistics(
        logits_ptr,
        stride_m,
        offs_m,
        target,
        counted,
        valid,
        V,
        softcap,
        label_smoothing,
        BLOCK_M,
        UNROLL,
        BLOCK_V,
        VEC,
    )
    lse = top + log_sum
    loss = (top - s) + log_sum
    if label_smoothing is not None:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (
            (top - columns_sum / V) + log_sum
        )
    loss = tl.where(counted, tl.where(valid, loss + z_loss * lse * lse, float("nan")), 0.0)
    tl.store(loss_ptr + offs_m, loss, mask=offs_m < N)
    return top, log_sum, s


@triton.jit
def _dlogits(x, columns, target, top, log_sum, at_target, factor, uniform, softcap):
    """The gradient of the logits x at `columns`; the rest are values of a row, (BLOCK_M, 1, 1)."""
    s = _cap(x.to(tl.float32), softcap)
    ds = factor * _exp((s - top) - log_sum) - uniform
    ds = tl.where(columns == target, at_target, ds)
    return ds if softcap is None else ds * (1.0 - (s / softcap) * (s / softcap))


@triton.jit
def _write_dlogits(
    logits_ptr, dlogits_ptr, stride_m, stride_dm, offs_m, target, counted, valid, top, log_sum, s, scale, N, V,
    softcap, label_smoothing, z_loss,
    UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store `scale` (BLOCK_M,) times the gradient of each row's loss; zeros for one that does not count, without reading it."""
    # 1 - p of the target, by 1 - exp(-2 x) = 2 tanh(x) / (1 + tanh(x)): exact where p is close to 1.
    half = tanh(0.5 * ((top - s) + log_sum))
    miss = 2.0 * half / (1.0 + half)
    scale = tl.where(counted, tl.where(valid, scale, float("nan")), 0.0)
    z_term = 2.0 * z_loss * (top + log_sum)
    smoothing = 0.0 if label_smoothing is None else label_smoothing
    uniform = (scale * (smoothing / V))[:, None, None]
    at_target = (scale * ((1.0 - miss) * z_term - miss + (smoothing - smoothing / V)))[
        :, None, None
    ]
    factor = (scale * (1.0 + z_term))[:, None, None]
    top, log_sum = top[:, None, None], log_sum[:, None, None]
    read, written = counted[:, None, None], (offs_m < N)[:, None, None]

    lead, body = _split(offs_m, stride_m, V, UNROLL * BLOCK_V, VEC)
    aligned_ptr = _aligned(logits_ptr, offs_m, stride_m, VEC)
    # Rows of both begin equally far from an aligned address (see empty_gradient).
    out_ptr = _aligned(dlogits_ptr, offs_m, stride_dm, VEC)
    offs = _tile_columns(UNROLL, BLOCK_V)
    body_target = (target - lead)[:, None, None]
    for start in range(0, body, UNROLL * BLOCK_V):
        x = tl.load(aligned_ptr + start + offs, mask=read, other=float("-inf"))
        d = _dlogits(
            x, offs, body_target - start, top, log_sum, at_target, factor, uniform, softcap
        )
        tl.store(out_ptr + start + offs, d.to(dlogits_ptr.dtype.element_ty), mask=written)
    row_ptr = logits_ptr + (offs_m * stride_m)[:, None, None]
    out_ptr = dlogits_ptr + (offs_m * stride_dm)[:, None, None]
    for start in range(0, V - body, BLOCK_V):
        columns = _rest_columns(start, lead, body, BLOCK_V)
        inside = columns < V
        x = tl.load(row_ptr + columns, mask=inside & read, other=float("-inf"))
        d = _dlogits(
            x, columns, target[:, None, None], top, log_sum, at_target, factor, uniform, softcap
        )
        tl.store(out_ptr + columns, d.to(dlogits_ptr.dtype.element_ty), mask=inside & written)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, statistics_ptr,
    stride_m,
    N, V, ignore_index, softcap, label_smoothing, z_loss,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    offs_m, target, counted, valid = _rows(target_ptr, ignore_index, N, V, BLOCK_M)
    top, log_sum, _ = _forward(
        logits_ptr, loss_ptr, stride_m, offs_m, target, counted, valid, N, V, softcap, label_smoothing, z_loss,
        BLOCK_M, UNROLL, BLOCK_V, VEC,
    )  # fmt: skip
    if statistics_ptr is not None:
        tl.store(statistics_ptr + offs_m, top, mask=offs_m < N)
        tl.store(statistics_ptr + N + offs_m, log_sum, mask=offs_m < N)


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr, logits_ptr, target_ptr, statistics_ptr, divisor_ptr, dlogits_ptr,
    stride_dloss, stride_m, stride_dm,
    N, V, ignore_index, softcap, label_smoothing, z_loss,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    offs_m, target, counted, valid = _rows(target_ptr, ignore_index, N, V, BLOCK_M)
    mask_m = offs_m < N
    top = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)
    log_sum = tl.load(statistics_ptr + N + offs_m, mask=mask_m, other=0.0)
    s = _cap(
        tl.load(logits_ptr + offs_m * stride_m + target, mask=valid, other=0.0).to(tl.float32),
        softcap,
    )
    scale = tl.load(dloss_ptr + offs_m * stride_dloss, mask=mask_m, other=0.0).to(
        tl.float32
    ) / tl.load(divisor_ptr)
    _write_dlogits(
        logits_ptr, dlogits_ptr, stride_m, stride_dm, offs_m, target, counted, valid, top, log_sum, s, scale, N, V,
        softcap, label_smoothing, z_loss, UNROLL, BLOCK_V, VEC,
    )  # fmt: skip


@triton.jit
def _cross_entropy_fwd_bwd_kernel(
    logits_ptr, target_ptr, dloss_ptr, loss_ptr,
    stride_m, stride_dloss,
    N, V, ignore_index, softcap, label_smoothing, z_loss,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Rows' losses, and in place of the logits the gradient of their sum, or of their sum weighted by dloss."""
    offs_m, target, counted, valid = _rows(target_ptr, ignore_index, N, V, BLOCK_M)
    top, log_sum, s = _forward(
        logits_ptr, loss_ptr, stride_m, offs_m, target, counted, valid, N, V, softcap, label_smoothing, z_loss,
        BLOCK_M, UNROLL, BLOCK_V, VEC,
    )  # fmt: skip
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if dloss_ptr is not None:
        scale = tl.load(dloss_ptr + offs_m * stride_dloss, mask=offs_m < N, other=0.0).to(
            tl.float32
        )
    # No thread may write where another one still has to read.
    tl.debug_barrier()
    _write_dlogits(
        logits_ptr, logits_ptr, stride_m, stride_m, offs_m, target, counted, valid, top, log_sum, s, scale, N, V,
        softcap, label_smoothing, z_loss, UNROLL, BLOCK_V, VEC,
    )  # fmt: skip


@triton.jit
def _cross_entropy_reduce_kernel(
    rows_ptr, target_ptr, loss_ptr, divisor_ptr,
    N, ignore_index,
    IS_MEAN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up the rows' losses, always in the same order."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        total += tl.load(rows_ptr + offs_n, mask=mask_n, other=0.0)
        if IS_MEAN:
            target = tl.load(target_ptr + offs_n, mask=mask_n)
            count += (mask_n & (target != ignore_index)).to(tl.int32)
    divisor = tl.maximum(tl.sum(count, axis=0), 1) if IS_MEAN else 1
    tl.store(loss_ptr, tl.sum(total, axis=0) / divisor)
    tl.store(divisor_ptr, divisor)
