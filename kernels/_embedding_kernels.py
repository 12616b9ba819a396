"""Kernels of embedding. embedding.py gives math, shapes and precision.

Without dropout seed_ptr, threshold and scale are None.
"""

from .core.dropout import kept_tile
from .core.triton import tl, triton


@triton.jit
def _embedding_fwd_kernel(
    tokens_ptr, weight_ptr, position_ptr, position_weight_ptr, seed_ptr, y_ptr,
    stride_wv, stride_pc,
    N, V, C, T, D, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N columns of BLOCK_M rows of y. Both positions may be None."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < N
    mask_n = (offs_n < D)[None, :]

    # the rows of the tokens
    token = tl.load(tokens_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    is_valid = (token >= 0) & (token < V)
    weight_ptrs = weight_ptr + (token * stride_wv)[:, None] + offs_n[None, :]
    y = tl.load(weight_ptrs, mask=(mask_m & is_valid)[:, None] & mask_n, other=0.0).to(tl.float32)

    # the rows of the positions
    if position_weight_ptr is not None:
        if position_ptr is not None:
            position = tl.load(position_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        else:
            position = offs_m % T
        is_valid = is_valid & (position >= 0) & (position < C)
        position_ptrs = position_weight_ptr + (position * stride_pc)[:, None] + offs_n[None, :]
        mask = (mask_m & is_valid)[:, None] & mask_n
        y += tl.load(position_ptrs, mask=mask, other=0.0).to(tl.float32)

    if seed_ptr is not None:
        first_n = tl.program_id(1) * BLOCK_N
        kept = kept_tile(tl.load(seed_ptr), offs_m, first_n, D, threshold, BLOCK_M, BLOCK_N)
        y = tl.where(kept, y * scale, 0.0)

    # an invalid index gives NaN
    y = tl.where(is_valid[:, None], y, float("nan")).to(y_ptr.dtype.element_ty)
    y_ptrs = y_ptr + (offs_m * D)[:, None] + offs_n[None, :]
    tl.store(y_ptrs, y, mask=mask_m[:, None] & mask_n)


@triton.jit
def _store_row(dweight_ptr, row, total, D, offs_n, IS_ADDED: tl.constexpr):
    """Write `total` to columns offs_n of a row of dweight, or add it."""
    ptrs = dweight_ptr + row.to(tl.int64) * D + offs_n
    if IS_ADDED:
        total += tl.load(ptrs, mask=offs_n < D, other=0.0).to(tl.float32)
    tl.store(ptrs, total.to(dweight_ptr.dtype.element_ty), mask=offs_n < D)


@triton.jit
def _embedding_bwd_kernel(
    dy_ptr, keys_ptr, order_ptr, seed_ptr, dweight_ptr, partial_ptr,
    stride_dym,
    N, V, D, threshold, scale,
    IS_ADDED: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program i sums a run of equal tokens, or the part of it that is in one piece.

    Program i starts at sorted position i, if a run begins there or a piece begins inside a run.
    Other programs return.

    keys: sorted tokens. The sum of a run in one piece goes to dweight. A longer run has a partial
    sum per piece, which goes to `partial` (pieces, 2, D): row 1 if the run begins in the piece,
    else row 0. IS_ADDED: add to the rows of dweight instead of overwriting them.
    """
    i = tl.program_id(0)
    key = tl.load(keys_ptr + i)
    begins = key != tl.load(keys_ptr + i - 1, mask=i > 0, other=-1)
    piece = i // PIECE
    if (begins | (i % PIECE == 0)) & (key >= 0) & (key < V):
        # the part of the run in this piece
        stop = tl.minimum(piece * PIECE + PIECE, N)
        offs = i + tl.arange(0, PIECE)
        same = tl.load(keys_ptr + offs, mask=offs < stop, other=-1) == key
        length = tl.sum(same.to(tl.int32), axis=0)

        # its sum
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < D
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, length, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < length
            row = tl.load(order_ptr + i + offs_m, mask=mask_m, other=0).to(tl.int64)
            dy_ptrs = dy_ptr + (row * stride_dym)[:, None] + offs_n[None, :]
            dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
            if seed_ptr is not None:
                first_n = tl.program_id(1) * BLOCK_N
                kept = kept_tile(tl.load(seed_ptr), row, first_n, D, threshold, BLOCK_M, BLOCK_N)
                dy = tl.where(kept, dy * scale, 0.0)
            acc += dy
        total = tl.sum(acc, axis=0)

        # to dweight, or to the partial sums
        end = i + length
        goes_on = tl.load(keys_ptr + end, mask=end < N, other=-1) == key
        if begins & (goes_on == 0):
            _store_row(dweight_ptr, key, total, D, offs_n, IS_ADDED)
        else:
            slot = (2 * piece + begins.to(tl.int32)).to(tl.int64)
            tl.store(partial_ptr + slot * D + offs_n, total, mask=mask_n)


@triton.jit
def _embedding_bwd_long_runs_kernel(
    keys_ptr, partial_ptr, dweight_ptr,
    N, V, D,
    IS_ADDED: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The program of a piece adds the partial sums of the run that begins there and continues."""
    piece = tl.program_id(0)
    after = (piece + 1) * PIECE
    key = tl.load(keys_ptr + after - 1, mask=after < N, other=-1)
    before = tl.load(keys_ptr + piece * PIECE - 1, mask=piece > 0, other=-1)
    goes_on = tl.load(keys_ptr + after, mask=after < N, other=-1) == key
    if goes_on & (key != before) & (key >= 0) & (key < V):
        # the number of pieces to which the run continues
        count = 0
        for start in range(after, N, PIECE * BLOCK_P):
            offs = start + tl.arange(0, BLOCK_P) * PIECE
            same = tl.load(keys_ptr + offs, mask=offs < N, other=-1) == key
            count += tl.sum(same.to(tl.int32), axis=0)

        # the sums of these pieces, then that of the first
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < D
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, count, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            slot = 2 * (piece + 1 + offs_m).to(tl.int64)
            partial_ptrs = partial_ptr + (slot * D)[:, None] + offs_n[None, :]
            acc += tl.load(
                partial_ptrs, mask=(offs_m < count)[:, None] & mask_n[None, :], other=0.0
            )
        slot = (2 * piece + 1).to(tl.int64)
        total = tl.load(partial_ptr + slot * D + offs_n, mask=mask_n, other=0.0)
        total += tl.sum(acc, axis=0)
        _store_row(dweight_ptr, key, total, D, offs_n, IS_ADDED)
