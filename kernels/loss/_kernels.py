"""Kernels of cross_entropy and linear_cross_entropy: a program owns BLOCK_M rows of logits.

cross_entropy.py gives math, shapes and precision.

Columns    The main loop loads tiles of UNROLL x BLOCK_V columns without a mask, 16 bytes per load.
           It starts at the row's first address that is a multiple of 16 bytes from the start of the
           tensor: most rows of 50,257 columns start between two such addresses. A second loop, with
           a mask, takes the columns before that address and the columns after the last tile.
Softmax    Each lane keeps the maximum and the sum of exponentials of the columns that it has read.
           The lanes are combined once, at the end of the row.
Target     The sum of exponentials leaves out the target's column. If the target has the largest
           logit, log(1 + sum) keeps the digits of the other columns. The loss and the target's
           gradient p - 1 are then accurate even if p rounds to 1.
Padding    Columns from V on are not read. Their gradient is 0.
Rows       A row whose target is ignore_index is not read: its loss and gradient are 0. A row whose
           target is not a column gets NaN for both.
Cost       memory-bound; cost() of cross_entropy.py gives bytes and FLOPs
"""

from ..core.tile import LN2, LOG2E, tanh
from ..core.triton import tl, triton

# The lowest finite float32. Unlike -inf, it can be subtracted from itself without a NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


# --- arithmetic


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, accurate to a few units in the last place.

    Below 1, where 1 + x would lose digits of x, it is the series of 2 artanh(x / (2 + x)).
    """
    z = x / (2.0 + x)
    zz = z * z
    series = 1.0 + zz * (
        1 / 3 + zz * (1 / 5 + zz * (1 / 7 + zz * (1 / 9 + zz * (1 / 11 + zz * (1 / 13 + zz / 15)))))
    )
    return tl.where(x < 1.0, 2.0 * z * series, tl.log2(1.0 + x) * LN2)


@triton.jit
def _cap(x, softcap):
    return x if softcap is None else softcap * tanh(x / softcap)


# --- rows and columns


@triton.jit
def _load_targets(target_ptr, ignore_index, N, V, BLOCK_M: tl.constexpr):
    """Return row numbers, target columns, and two masks: has a loss, target is a column."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + offs_m, mask=offs_m < N, other=ignore_index)
    has_loss = (offs_m < N) & (target != ignore_index)
    is_valid = has_loss & (target >= 0) & (target < V)
    # Kernels compare each column with the target. In int64 this takes twice the instructions.
    return offs_m, tl.where(is_valid, target, 0).to(tl.int32), has_loss, is_valid


@triton.jit
def _split(offs_m, stride_m, V, TILE: tl.constexpr, VEC: tl.constexpr):
    """Count the columns before each row's first aligned address, and those of the main loop."""
    first = offs_m * stride_m
    lead = (tl.cdiv(first, VEC) * VEC - first).to(tl.int32)
    return lead, tl.maximum(V - tl.max(lead, axis=0), 0) // TILE * TILE


@triton.jit
def _tile_columns(UNROLL: tl.constexpr, BLOCK_V: tl.constexpr):
    """Column offsets within a tile of the main loop, (1, UNROLL, BLOCK_V)."""
    return tl.arange(0, UNROLL)[None, :, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, None, :]


@triton.jit
def _tail_columns(start, lead, body, BLOCK_V: tl.constexpr):
    """Columns of a tile of the masked loop, (BLOCK_M, 1, BLOCK_V)."""
    offs = start + tl.arange(0, BLOCK_V)[None, None, :]
    return tl.where(offs < lead[:, None, None], offs, offs + body)


@triton.jit
def _aligned(ptr, offs_m, stride_m, VEC: tl.constexpr):
    """Pointers to the first aligned address of each row."""
    return ptr + (tl.cdiv(offs_m * stride_m, VEC) * VEC)[:, None, None]


# --- forward


@triton.jit
def _add_columns(top, total, x):
    """Add columns x (BLOCK_M, UNROLL, BLOCK_V) to each lane's maximum and sum of exponentials."""
    new_top = tl.maximum(top, tl.max(x, axis=1))
    total = total * _exp(top - new_top) + tl.sum(_exp(x - new_top[:, None, :]), axis=1)
    return new_top, total


@triton.jit
def _row_statistics(
    logits_ptr, stride_m, offs_m, target, has_loss, is_valid, V, softcap, label_smoothing,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """For each row, with s the capped logits, four values of shape (BLOCK_M,).

    top = max_v s_v;   log_sum = log sum_v exp(s_v - top);   s of the target;   sum_v s_v, which is
    computed only with label smoothing.
    """
    lead, body = _split(offs_m, stride_m, V, UNROLL * BLOCK_V, VEC)
    read = has_loss[:, None, None]
    top = tl.full((BLOCK_M, BLOCK_V), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    columns_sum = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)

    # main loop: aligned tiles
    aligned_ptr = _aligned(logits_ptr, offs_m, stride_m, VEC)
    offs = _tile_columns(UNROLL, BLOCK_V)
    body_target = (target - lead)[:, None, None]
    for start in range(0, body, UNROLL * BLOCK_V):
        x = _cap(tl.load(aligned_ptr + start + offs, mask=read, other=0.0).to(tl.float32), softcap)
        if label_smoothing is not None:
            columns_sum += tl.sum(x, axis=1)
        x = tl.where(offs == body_target - start, float("-inf"), x)
        top, total = _add_columns(top, total, x)

    # masked loop: the other columns
    row_ptr = logits_ptr + (offs_m * stride_m)[:, None, None]
    for start in range(0, V - body, BLOCK_V):
        columns = _tail_columns(start, lead, body, BLOCK_V)
        inside = columns < V
        x = _cap(tl.load(row_ptr + columns, mask=inside & read, other=0.0).to(tl.float32), softcap)
        if label_smoothing is not None:
            columns_sum += tl.sum(tl.where(inside, x, 0.0), axis=1)
        other = inside & (columns != target[:, None, None])
        top, total = _add_columns(top, total, tl.where(other, x, float("-inf")))

    # combine the lanes, then add the target
    others_top = tl.max(top, axis=1)
    others = tl.sum(total * _exp(top - others_top[:, None]), axis=1)
    s = tl.load(logits_ptr + offs_m * stride_m + target, mask=is_valid, other=0.0)
    s = _cap(s.to(tl.float32), softcap)
    row_top = tl.maximum(s, others_top)
    others *= _exp(others_top - row_top)
    log_sum = tl.where(s >= others_top, _log1p(others), tl.log2(others + _exp(s - row_top)) * LN2)
    return row_top, log_sum, s, tl.sum(columns_sum, axis=1)


@triton.jit
def _forward(
    logits_ptr, loss_ptr, statistics_ptr, correct_ptr, stride_m, offs_m, target, has_loss, is_valid,
    N, V, softcap, label_smoothing, z_loss,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store each row's loss. Return top, log_sum and the target's s, see _row_statistics.

    Also store top and log_sum, unless `statistics_ptr` is None, and whether no other column is
    above the target, unless `correct_ptr` is None.
    """
    top, log_sum, s, columns_sum = _row_statistics(
        logits_ptr, stride_m, offs_m, target, has_loss, is_valid, V, softcap, label_smoothing,
        BLOCK_M, UNROLL, BLOCK_V, VEC,
    )  # fmt: skip
    lse = top + log_sum
    loss = (top - s) + log_sum
    if label_smoothing is not None:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (
            (top - columns_sum / V) + log_sum
        )
    loss = tl.where(has_loss, tl.where(is_valid, loss + z_loss * lse * lse, float("nan")), 0.0)
    tl.store(loss_ptr + offs_m, loss, mask=offs_m < N)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + offs_m, top, mask=offs_m < N)
        tl.store(statistics_ptr + N + offs_m, log_sum, mask=offs_m < N)
    if correct_ptr is not None:
        tl.store(correct_ptr + offs_m, is_valid & (s == top), mask=offs_m < N)
    return top, log_sum, s


# --- backward


@triton.jit
def _dlogits(x, columns, target, top, log_sum, at_target, p_scale, uniform, softcap):
    """The gradient of logits x at `columns`: p_scale p - uniform, except `at_target` at the target.

    All arguments after x and columns hold one value per row, (BLOCK_M, 1, 1).
    """
    s = _cap(x.to(tl.float32), softcap)
    ds = p_scale * _exp((s - top) - log_sum) - uniform
    ds = tl.where(columns == target, at_target, ds)
    return ds if softcap is None else ds * (1.0 - (s / softcap) * (s / softcap))


@triton.jit
def _write_dlogits(
    logits_ptr, dlogits_ptr, stride_m, stride_dm, offs_m, target, has_loss, is_valid,
    top, log_sum, s, scale, N, V, V_padded, softcap, label_smoothing, z_loss,
    UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store the gradient of each row's loss, times `scale` (BLOCK_M,).

    Rows without a loss get zeros; their logits are not read. So do the columns from V to V_padded.
    """
    # miss = 1 - p of the target. The identity 1 - exp(-2 x) = 2 tanh(x) / (1 + tanh(x)) keeps its
    # digits where p is close to 1.
    half = tanh(0.5 * ((top - s) + log_sum))
    miss = 2.0 * half / (1.0 + half)

    # terms that are the same for all columns of a row
    scale = tl.where(has_loss, tl.where(is_valid, scale, float("nan")), 0.0)
    z_term = 2.0 * z_loss * (top + log_sum)
    smoothing = 0.0 if label_smoothing is None else label_smoothing
    uniform = (scale * (smoothing / V))[:, None, None]
    at_target = scale * ((1.0 - miss) * z_term - miss + (smoothing - smoothing / V))
    at_target = at_target[:, None, None]
    p_scale = (scale * (1.0 + z_term))[:, None, None]
    top, log_sum = top[:, None, None], log_sum[:, None, None]
    read, written = has_loss[:, None, None], (offs_m < N)[:, None, None]

    # main loop: aligned tiles; empty_gradient aligns the rows of dlogits like the rows of logits
    lead, body = _split(offs_m, stride_m, V, UNROLL * BLOCK_V, VEC)
    aligned_ptr = _aligned(logits_ptr, offs_m, stride_m, VEC)
    out_ptr = _aligned(dlogits_ptr, offs_m, stride_dm, VEC)
    offs = _tile_columns(UNROLL, BLOCK_V)
    body_target = (target - lead)[:, None, None]
    for start in range(0, body, UNROLL * BLOCK_V):
        x = tl.load(aligned_ptr + start + offs, mask=read, other=float("-inf"))
        d = _dlogits(
            x, offs, body_target - start, top, log_sum, at_target, p_scale, uniform, softcap
        )
        tl.store(out_ptr + start + offs, d.to(dlogits_ptr.dtype.element_ty), mask=written)

    # masked loop: the other columns
    row_ptr = logits_ptr + (offs_m * stride_m)[:, None, None]
    out_ptr = dlogits_ptr + (offs_m * stride_dm)[:, None, None]
    for start in range(0, V_padded - body, BLOCK_V):
        columns = _tail_columns(start, lead, body, BLOCK_V)
        inside = columns < V
        x = tl.load(row_ptr + columns, mask=inside & read, other=float("-inf"))
        d = _dlogits(
            x, columns, target[:, None, None], top, log_sum, at_target, p_scale, uniform, softcap
        )
        d = tl.where(inside, d, 0.0).to(dlogits_ptr.dtype.element_ty)
        tl.store(out_ptr + columns, d, mask=(columns < V_padded) & written)


# --- kernels


@triton.jit(do_not_specialize=["N"])
def _cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, statistics_ptr, correct_ptr,
    stride_m,
    N, V, ignore_index, softcap, label_smoothing, z_loss,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store each row's loss. `statistics_ptr` and `correct_ptr` may be None, as in _forward."""
    offs_m, target, has_loss, is_valid = _load_targets(target_ptr, ignore_index, N, V, BLOCK_M)
    _forward(
        logits_ptr, loss_ptr, statistics_ptr, correct_ptr, stride_m, offs_m, target, has_loss,
        is_valid, N, V, softcap, label_smoothing, z_loss, BLOCK_M, UNROLL, BLOCK_V, VEC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _cross_entropy_bwd_kernel(
    dloss_ptr, logits_ptr, target_ptr, statistics_ptr, divisor_ptr, dlogits_ptr,
    stride_dloss, stride_m, stride_dm,
    N, V, V_padded, ignore_index, softcap, label_smoothing, z_loss,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the logits, from the statistics of the forward.

    The gradient of columns V to V_padded is 0.
    """
    offs_m, target, has_loss, is_valid = _load_targets(target_ptr, ignore_index, N, V, BLOCK_M)
    mask_m = offs_m < N
    top = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)
    log_sum = tl.load(statistics_ptr + N + offs_m, mask=mask_m, other=0.0)
    s = tl.load(logits_ptr + offs_m * stride_m + target, mask=is_valid, other=0.0)
    s = _cap(s.to(tl.float32), softcap)
    dloss = tl.load(dloss_ptr + offs_m * stride_dloss, mask=mask_m, other=0.0)
    scale = dloss.to(tl.float32) / tl.load(divisor_ptr)
    _write_dlogits(
        logits_ptr, dlogits_ptr, stride_m, stride_dm, offs_m, target, has_loss, is_valid,
        top, log_sum, s, scale, N, V, V_padded, softcap, label_smoothing, z_loss,
        UNROLL, BLOCK_V, VEC,
    )  # fmt: skip


@triton.jit
def _cross_entropy_fwd_bwd_kernel(
    logits_ptr, target_ptr, dloss_ptr, loss_ptr, statistics_ptr, correct_ptr,
    stride_m, stride_dloss,
    N, V, V_padded, ignore_index, softcap, label_smoothing, z_loss,
    BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Store each row's loss, and overwrite the logits with the gradient of sum_n dloss_n loss_n.

    If `dloss_ptr` is None, every dloss_n is 1. `statistics_ptr` and `correct_ptr` may be None, as
    in _forward. The gradient of columns V to V_padded is 0.
    """
    offs_m, target, has_loss, is_valid = _load_targets(target_ptr, ignore_index, N, V, BLOCK_M)
    top, log_sum, s = _forward(
        logits_ptr, loss_ptr, statistics_ptr, correct_ptr, stride_m, offs_m, target, has_loss,
        is_valid, N, V, softcap, label_smoothing, z_loss, BLOCK_M, UNROLL, BLOCK_V, VEC,
    )  # fmt: skip
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if dloss_ptr is not None:
        scale = tl.load(dloss_ptr + offs_m * stride_dloss, mask=offs_m < N, other=0.0)
        scale = scale.to(tl.float32)
    # All threads must have read the logits before any thread overwrites them.
    tl.debug_barrier()
    _write_dlogits(
        logits_ptr, logits_ptr, stride_m, stride_m, offs_m, target, has_loss, is_valid,
        top, log_sum, s, scale, N, V, V_padded, softcap, label_smoothing, z_loss,
        UNROLL, BLOCK_V, VEC,
    )  # fmt: skip


@triton.jit
def _cross_entropy_reduce_kernel(
    rows_ptr, target_ptr, loss_ptr, divisor_ptr,
    N, ignore_index,
    IS_MEAN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Reduce the losses of all rows in one program, always in the same order."""
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


@triton.jit
def _linear_cross_entropy_scale_kernel(
    grad_ptr, dloss_ptr, divisor_ptr, out_ptr, numel, BLOCK_N: tl.constexpr
):
    """Multiply BLOCK_N elements of a gradient by dloss / divisor."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < numel
    scale = tl.load(dloss_ptr).to(tl.float32) / tl.load(divisor_ptr)
    grad = tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + offs_n, grad.to(out_ptr.dtype.element_ty), mask=mask_n)
