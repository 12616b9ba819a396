"""What the kernels of causal attention share: where a program works, how it reads and writes, the arithmetic of one tile.

Whatever is walked comes through a TMA descriptor where the launcher could make one, through pointers otherwise: `_rows` and
`_statistics` are where the two meet.

Scores live in the base-2 domain: p = exp2(s c - m), c = scale log2(e), with m the running maximum of s c. It starts at LOWEST
rather than -inf, so that rows without a visible key yet need no case of their own.
"""

from ..core.tile import tanh
from ..core.triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)


# --- where a program works


@triton.jit
def _place(
    work_ptr, cu_seqlens_ptr, T, S, H, tiles, heads, heads_at_once, BLOCK: tl.constexpr, IS_KEYS: tl.constexpr
):  # fmt: skip
    """Which tile, batch and head a program owns, and where its sequence lies: first token, queries, keys.

    Heads go in groups whose keys and values fit the L2 together; inside a group the tiles with most work come first.
    """
    pid = tl.program_id(0)
    first_head = pid // (heads_at_once * tiles) * heads_at_once
    within = pid - first_head * tiles
    at_once = tl.minimum(heads_at_once, heads - first_head)
    head = first_head + within % at_once
    rank = within // at_once
    if cu_seqlens_ptr is None:
        # The last queries see most keys, the first keys are seen by most queries.
        tile = rank if IS_KEYS else tiles - 1 - rank
        return tile, head // H, head % H, 0, T, S
    else:
        # A slot that no tile took holds -1, -1: the first tile of an empty document.
        document = tl.load(work_ptr + 2 * rank)
        used = document >= 0
        start = tl.load(cu_seqlens_ptr + document, mask=used, other=0)
        stop = tl.load(cu_seqlens_ptr + document + 1, mask=used, other=0)
        # What cu_seqlens holds cannot be checked without waiting for the GPU; whatever it is, no access leaves the tensors.
        start = tl.minimum(tl.maximum(start, 0), T)
        length = tl.minimum(tl.maximum(stop, start), T) - start
        tile = tl.maximum(tl.load(work_ptr + 2 * rank + 1), 0)
        if IS_KEYS:
            tile = tl.maximum(tl.cdiv(length, BLOCK) - 1 - tile, 0)
        return tile, 0, head, start, length, length


@triton.jit
def _key_range(first, queries, shift, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that a tile of queries walks, in tiles: from the window's edge, all seen from, all seen to, to the diagonal."""
    hi = tl.minimum(first + BLOCK_M, queries) + shift
    # Keys that the first query of the tile sees, every later one sees too: all but the window's last few.
    inner_hi = (first + shift + 1) // BLOCK_N * BLOCK_N
    if window is None:
        return 0, 0, inner_hi, hi
    else:
        lo = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        inner_lo = tl.cdiv(tl.maximum(first + BLOCK_M + shift - window, 0), BLOCK_N) * BLOCK_N
        # A window too narrow for any such tile has its edge and the diagonal in the same ones.
        inner_lo = tl.minimum(inner_lo, tl.maximum(inner_hi, lo))
        return lo, inner_lo, tl.maximum(inner_hi, inner_lo), hi


@triton.jit
def _query_range(first, queries, shift, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Queries that a tile of keys walks, in tiles: from the diagonal, all see from, all see to, to the window's end."""
    lo = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
    inner_lo = lo + tl.cdiv(tl.maximum(first + BLOCK_N - 1 - shift - lo, 0), BLOCK_M) * BLOCK_M
    if window is None:
        return lo, tl.minimum(inner_lo, queries), queries, queries
    else:
        hi = tl.minimum(first + BLOCK_N - 1 - shift + window, queries)
        inner_hi = lo + tl.maximum(first + window - shift - lo, 0) // BLOCK_M * BLOCK_M
        inner_hi = tl.minimum(tl.maximum(inner_hi, inner_lo), hi)
        return lo, tl.minimum(inner_lo, hi), inner_hi, hi


# --- loads and stores


@triton.jit
def _rows(
    source, batch, first, end, head, stride_b, stride_t, stride_h,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tokens [first, first + BLOCK) of one head, (BLOCK, BLOCK_K): zeros from token `end` and column HEAD on."""
    if isinstance(source, tl.tensor_descriptor):
        return source.load([batch, first, head, 0]).reshape(BLOCK, BLOCK_K)
    else:
        offs, offs_k = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK_K)
        start = source + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
        start += tl.cast(first, tl.int64) * stride_t
        mask = (offs < end - first)[:, None] & (offs_k < HEAD)[None, :]
        return tl.load(start + offs[:, None] * stride_t + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def _statistics(source, index, first, end, T, other, BLOCK: tl.constexpr):
    """One number for each of the tokens [first, first + BLOCK) of row `index` of (rows, T): `other` from token `end` on.

    A descriptor gives 0 there, as `_rows` does for the tokens themselves, and what follows from zeros alone is 0 too. It is
    for whole rows, read in whole tiles.
    """
    if isinstance(source, tl.tensor_descriptor):
        # An ordinary load of so few numbers puts every one of them into each thread that needs it: 32 more instructions.
        return source.load([index, first]).reshape(BLOCK)
    else:
        offs = first + tl.arange(0, BLOCK)
        return tl.load(source + index.to(tl.int64) * T + offs, mask=offs < end, other=other)


@triton.jit
def _store_rows(
    pointer, tile, batch, first, end, head, stride_b, stride_t, stride_h,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write what `_rows` would read."""
    offs, offs_k = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK_K)
    start = pointer + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    start += tl.cast(first, tl.int64) * stride_t
    mask = (offs < end - first)[:, None] & (offs_k < HEAD)[None, :]
    tl.store(
        start + offs[:, None] * stride_t + offs_k[None, :],
        tile.to(pointer.dtype.element_ty),
        mask=mask,
    )


# --- arithmetic of a tile


@triton.jit
def _capped(s, scale, softcap):
    """Scores ready for exp2 once multiplied by `_exponent`: raw products, or soft-capped ones."""
    return s if softcap is None else softcap * tanh(s * (scale / softcap))


@triton.jit
def _exponent(scale, softcap):
    return scale * LOG2E if softcap is None else LOG2E


@triton.jit
def _weights(s, m, c, IS_EDGE: tl.constexpr):
    """Weights of a tile of scores against the maximum so far: p, what earlier weights shrink by, and the new maximum."""
    if IS_EDGE:
        # The largest score of a tile weighs 1 exactly, though s c - m is one rounded operation: a lone key gives its value.
        largest = tl.maximum(tl.max(s, 1), LOWEST)
        behind = tl.where(largest * c >= m, 0.0, largest * c - m)
        new = tl.maximum(m, largest * c)
        return tl.exp2((s - largest[:, None]) * c + behind[:, None]), tl.exp2(m - new), new
    else:
        new = tl.maximum(m, tl.max(s, 1) * c)
        return tl.exp2(s * c - new[:, None]), tl.exp2(m - new), new


@triton.jit
def _visible(queries, keys, shift, window):
    """Which keys are seen by which queries, of indices that broadcast against each other."""
    ahead = queries + shift - keys
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


@triton.jit
def _kept(
    seed,
    row,
    quads_per_row,
    first_row,
    first_key,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which attention weights of a tile dropout keeps: word j % 4 of Philox counter row * quads_per_row + j / 4 for key j."""
    rows = row + first_row + tl.arange(0, BLOCK_M)
    quads = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = tl.randint4x(seed, rows[:, None] * quads_per_row + quads[None, :])
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return pairs.reshape(BLOCK_M, BLOCK_N).to(tl.int32, bitcast=True) >= threshold


# --- packed documents: a program owns BLOCK_T slots of the list of tiles


@triton.jit
def _causal_attention_schedule_kernel(
    cu_seqlens_ptr, work_ptr, tiles, documents,
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """List (document, tile) for every tile of BLOCK tokens, those with most work first.

    Slot floor(start / BLOCK) + document + tile is every tile's own, without a sum over documents; some slots stay empty.
    """
    slots = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    document = tl.full((BLOCK_T,), -1, tl.int32)
    for first in range(0, documents, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        begins = tl.load(cu_seqlens_ptr + d, mask=d < documents, other=0) // BLOCK + d
        document += tl.sum(
            ((begins[None, :] <= slots[:, None]) & (d < documents)[None, :]).to(tl.int32), 1
        )
    # Slots before the first document, if that does not begin at 0, have none: their tile is below 0.
    document = tl.maximum(document, 0)
    start = tl.load(cu_seqlens_ptr + document)
    tile = slots - (start // BLOCK + document)
    used = (tile >= 0) & (tile < tl.cdiv(tl.load(cu_seqlens_ptr + document + 1) - start, BLOCK))

    rank = tl.zeros((BLOCK_T,), tl.int32)
    for first in range(0, documents, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        lengths = tl.load(cu_seqlens_ptr + d + 1, mask=d < documents, other=0)
        lengths -= tl.load(cu_seqlens_ptr + d, mask=d < documents, other=0)
        more = tl.maximum(tl.cdiv(lengths, BLOCK)[None, :] - tile[:, None], 0)
        # Tiles further into their documents come first; of equal ones that of the earlier document.
        rank += tl.sum(
            tl.maximum(more - 1, 0) + ((more > 0) & (d[None, :] < document[:, None])).to(tl.int32),
            1,
        )
    # Of documents that make no sense the ranks may lie anywhere, their sum having wrapped around.
    used &= (rank >= 0) & (rank < tiles)
    tl.store(work_ptr + 2 * rank, document, mask=used)
    tl.store(work_ptr + 2 * rank + 1, tile, mask=used)
