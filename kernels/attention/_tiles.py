"""Functions that the attention kernels share: find a tile, load and store it, compute with it.

Base 2     GPUs have an instruction for exp2 but none for exp. exp(scale q k^T) = exp2(c q k^T) with
           c = scale log2(e), so exp2 costs no extra multiplication.
Loads      a `source` is a TMA descriptor if the launcher could make one, otherwise a pointer. With
           a descriptor one instruction loads a whole tile. `_load_rows` and `_load_statistics`
           accept both.
Maximum    the running maximum starts at LOWEST, the lowest finite float32. For a query that has
           seen no key yet, exp2(-inf - LOWEST) = 0, whereas exp2(-inf - (-inf)) would be NaN.
"""

from ..core.dropout import kept_tile
from ..core.tile import LOG2E, tanh
from ..core.triton import tl, triton

LOWEST = tl.constexpr(-3.4028234663852886e38)


# --- which tile a program owns


@triton.jit
def _locate(
    work_ptr, cu_seqlens_ptr, T, S, H, tiles, heads, heads_at_once,
    BLOCK: tl.constexpr, IS_KEYS: tl.constexpr,
):  # fmt: skip
    """Return where this program works.

    That is: tile, batch and head; its row of partial sums, which no other program of the head has;
    first token, queries and keys of its sequence.

    Programs run roughly in the order of their ids. Heads go in groups of `heads_at_once`, whose
    keys and values fit in the L2 cache together. Within a group the tiles with the most work come
    first. Tiles with little work come last and fill the multiprocessors that become free.
    """
    # Head, and the tile's rank among the tiles of its group of heads.
    pid = tl.program_id(0)
    first_head = pid // (heads_at_once * tiles) * heads_at_once
    within = pid - first_head * tiles
    at_once = tl.minimum(heads_at_once, heads - first_head)
    head = first_head + within % at_once
    rank = within // at_once
    if cu_seqlens_ptr is None:
        # The last queries see the most keys. The first keys are seen by the most queries.
        tile = rank if IS_KEYS else tiles - 1 - rank
        return tile, head // H, head % H, head // H * tiles + tile, 0, T, S
    else:
        # Packed documents: read (document, tile) from the list. An unused slot holds (-1, -1) and
        # becomes the first tile of an empty document.
        document = tl.load(work_ptr + 2 * rank)
        used = document >= 0
        start = tl.load(cu_seqlens_ptr + document, mask=used, other=0)
        stop = tl.load(cu_seqlens_ptr + document + 1, mask=used, other=0)
        # Checking cu_seqlens on the host would wait for the GPU. Clamp instead, so that invalid
        # values cause no access out of bounds.
        start = tl.minimum(tl.maximum(start, 0), T)
        length = tl.minimum(tl.maximum(stop, start), T) - start
        tile = tl.maximum(tl.load(work_ptr + 2 * rank + 1), 0)
        if IS_KEYS:
            tile = tl.maximum(tl.cdiv(length, BLOCK) - 1 - tile, 0)
        return tile, 0, head, rank, start, length, length


@triton.jit
def _key_range(first, queries, shift, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split the keys that queries [first, first + BLOCK_M) see into three ranges; return 4 bounds.

    The ranges are: tiles on the window's edge, tiles that every query sees in full, tiles on the
    diagonal. `shift` is S - T. Ranges begin at multiples of BLOCK_N.
    """
    hi = tl.minimum(first + BLOCK_M, queries) + shift
    # Later queries see every key that the first query sees, except the oldest keys of its window.
    inner_hi = (first + shift + 1) // BLOCK_N * BLOCK_N
    if window is None:
        return 0, 0, inner_hi, hi
    else:
        lo = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        inner_lo = tl.cdiv(tl.maximum(first + BLOCK_M + shift - window, 0), BLOCK_N) * BLOCK_N
        # In a narrow window no tile is seen in full: its edge and the diagonal share tiles.
        inner_lo = tl.minimum(inner_lo, tl.maximum(inner_hi, lo))
        return lo, inner_lo, tl.maximum(inner_hi, inner_lo), hi


@triton.jit
def _query_range(first, queries, shift, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split the queries that see keys [first, first + BLOCK_N) into three ranges; return 4 bounds.

    The ranges are: tiles on the diagonal, tiles that see every key, tiles on the window's edge.
    """
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
def _load_rows(
    source, batch, first, end, head, stride_b, stride_t, stride_h,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load tokens [first, first + BLOCK) of one head, (BLOCK, BLOCK_K).

    Columns from HEAD on are zero. So are tokens from `end` on if `source` is a pointer; a
    descriptor gives zeros only past the end of the tensor.
    """
    if isinstance(source, tl.tensor_descriptor):
        return source.load([batch, first, head, 0]).reshape(BLOCK, BLOCK_K)
    else:
        offs, offs_k = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK_K)
        start = source + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
        start += tl.cast(first, tl.int64) * stride_t
        mask = (offs < end - first)[:, None] & (offs_k < HEAD)[None, :]
        return tl.load(start + offs[:, None] * stride_t + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def _load_statistics(source, rows, index, first, end, T, other, BLOCK: tl.constexpr):
    """Load one number per token [first, first + BLOCK) from row `index` of (rows, T).

    Tokens from `end` on give `other`. A descriptor gives 0 there instead. This is safe, because the
    launcher makes a descriptor only if `end` is the end of the row. Then `_load_rows` gives zeros
    for these tokens, and they add nothing to a gradient. `rows` is the source of these rows.
    """
    offs = first + tl.arange(0, BLOCK)
    if isinstance(source, tl.tensor_descriptor):
        # An ordinary load puts each number into every thread that needs it: 32 more instructions
        # (November 2026).
        return source.load([index, first]).reshape(BLOCK)
    elif isinstance(rows, tl.tensor_descriptor):
        # For wgmma Triton gives a load of fewer numbers than threads to every thread that needs it:
        # 190 more instructions and spilled registers (sm_90, November 2026). Four copies of each
        # number prevent this.
        offs = offs[:, None] + 0 * tl.arange(0, 4)[None, :]
        copies = tl.load(source + index.to(tl.int64) * T + offs, mask=offs < end, other=other)
        return tl.max(copies, 1)
    else:
        return tl.load(source + index.to(tl.int64) * T + offs, mask=offs < end, other=other)


@triton.jit
def _store_rows(
    pointer, tile, batch, first, end, head, stride_b, stride_t, stride_h,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store `tile` as tokens [first, first + BLOCK) of one head; skip tokens from `end` on."""
    offs, offs_k = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK_K)
    start = pointer + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    start += tl.cast(first, tl.int64) * stride_t
    mask = (offs < end - first)[:, None] & (offs_k < HEAD)[None, :]
    tl.store(
        start + offs[:, None] * stride_t + offs_k[None, :],
        tile.to(pointer.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _store_column_sums(
    partial_ptr, tile, row, head, heads, HEAD: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store the sums of the columns of `tile`, one head of a row of (rows, heads, HEAD)."""
    offs_k = tl.arange(0, BLOCK_K)
    partial_ptr += (tl.cast(row, tl.int64) * heads + head) * HEAD
    tl.store(partial_ptr + offs_k, tl.sum(tile, 0), mask=offs_k < HEAD)


# --- tile arithmetic


@triton.jit
def _capped_scores(s, scale, softcap):
    """Return s = q k^T unchanged, or softcap tanh(scale s / softcap). See `_exp2_scale`."""
    return s if softcap is None else softcap * tanh(s * (scale / softcap))


@triton.jit
def _exp2_scale(scale, softcap):
    """Return c such that exp(score) = exp2(c s), for s from `_capped_scores`.

    Soft-capped scores contain `scale` already.
    """
    return scale * LOG2E if softcap is None else LOG2E


@triton.jit
def _softmax_step(s, m, c, IS_EDGE: tl.constexpr):
    """One step of the online softmax, for scores s (BLOCK_M, BLOCK_N) and running maximum m.

    Return the weights exp2(s c - new maximum), the number by which to multiply earlier sums, and
    the new maximum.
    """
    if IS_EDGE:
        # Subtract the largest score before multiplying by c. Then its weight is exactly 1, and a
        # query that sees one key returns exactly the value of that key. s c - m would be rounded.
        # `behind` is largest c - m where that is negative, else 0.
        largest = tl.maximum(tl.max(s, 1), LOWEST)
        behind = tl.where(largest * c >= m, 0.0, largest * c - m)
        new = tl.maximum(m, largest * c)
        return tl.exp2((s - largest[:, None]) * c + behind[:, None]), tl.exp2(m - new), new
    else:
        new = tl.maximum(m, tl.max(s, 1) * c)
        return tl.exp2(s * c - new[:, None]), tl.exp2(m - new), new


@triton.jit
def _is_visible(queries, keys, shift, window):
    """Whether each query sees each key. The indices broadcast; `shift` is S - T."""
    ahead = queries + shift - keys
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


@triton.jit
def _dropout_mask(
    seed, row, row_keys, first_row, first_key, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return True for the attention weights to keep, (BLOCK_M, BLOCK_N)."""
    rows = row + first_row + tl.arange(0, BLOCK_M)
    return kept_tile(seed, rows, first_key, row_keys, threshold, BLOCK_M, BLOCK_N)


# --- packed documents: a program writes BLOCK_T slots of the list of tiles


@triton.jit(do_not_specialize=["tiles", "documents"])
def _causal_attention_schedule_kernel(
    cu_seqlens_ptr, work_ptr, tiles, documents,
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """List (document, tile) for every tile of BLOCK tokens. Tiles with the most work come first.

    Tile t of a document that begins at `start` has slot floor(start / BLOCK) + document + t. Slots
    are unique and need no sum over documents. Some slots belong to no tile.
    """
    # The document of each slot: count the documents that begin at or before it.
    slots = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    document = tl.full((BLOCK_T,), -1, tl.int32)
    for first in range(0, documents, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        begins = tl.load(cu_seqlens_ptr + d, mask=d < documents, other=0) // BLOCK + d
        document += tl.sum(
            ((begins[None, :] <= slots[:, None]) & (d < documents)[None, :]).to(tl.int32), 1
        )

    # The tile of each slot. Slots before the first document get a tile below 0.
    document = tl.maximum(document, 0)
    start = tl.load(cu_seqlens_ptr + document)
    tile = slots - (start // BLOCK + document)
    used = (tile >= 0) & (tile < tl.cdiv(tl.load(cu_seqlens_ptr + document + 1) - start, BLOCK))

    # Its rank: the number of tiles that come before it. Tile t of a document sees t + 1 tiles of
    # keys, so tiles with a larger t come first. Among equal ones the earlier document comes first.
    rank = tl.zeros((BLOCK_T,), tl.int32)
    for first in range(0, documents, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        lengths = tl.load(cu_seqlens_ptr + d + 1, mask=d < documents, other=0)
        lengths -= tl.load(cu_seqlens_ptr + d, mask=d < documents, other=0)
        more = tl.maximum(tl.cdiv(lengths, BLOCK)[None, :] - tile[:, None], 0)
        rank += tl.sum(
            tl.maximum(more - 1, 0) + ((more > 0) & (d[None, :] < document[:, None])).to(tl.int32),
            1,
        )

    # Invalid cu_seqlens can make the ranks overflow: never write outside the list.
    used &= (rank >= 0) & (rank < tiles)
    tl.store(work_ptr + 2 * rank, document, mask=used)
    tl.store(work_ptr + 2 * rank + 1, tile, mask=used)


# --- packed documents: the tokens before the first and after the last one


@triton.jit(do_not_specialize=["documents", "T"])
def _causal_attention_padding_kernel(
    x_ptr, cu_seqlens_ptr, documents, T, width, BLOCK: tl.constexpr
):
    """Write zeros to the tokens of x (rows, T, width) that are in no document."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + documents), begin), T)
    row_size = tl.cast(T, tl.int64) * width
    x_ptr += tl.program_id(1) * row_size
    # The programs of a row take turns. Without padding no iteration runs.
    first, step = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    for block in range(first, begin.to(tl.int64) * width, step):
        offs = block + tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, 0.0, mask=offs < begin.to(tl.int64) * width)
    for block in range(end.to(tl.int64) * width + first, row_size, step):
        offs = block + tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, 0.0, mask=offs < row_size)
