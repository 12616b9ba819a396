"""Kernels of causal attention: one forward, two backward, and the order of work over packed documents.

A program owns a tile of queries of one head and walks the keys they see (forward, dq), or owns a tile of keys and walks the
queries that see them, over all query heads of its group (dk and dv). Tiles that lie wholly inside the mask take a loop without
one; those its edges cross take the masked loop. Whatever is walked comes through a TMA descriptor where the launcher could make
one, through pointers otherwise: `_rows` is where the two meet. Optional arguments are None where they do not apply, and Triton
compiles what asks for them away.

Scores live in the base-2 domain: p = exp2(s c - m), c = scale log2(e), with m the running maximum of s c. It starts at LOWEST
rather than -inf, so that rows without a visible key yet need no case of their own.
"""

from ._tile import tanh
from ._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)


# --- what the kernels share


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
    tl.store(start + offs[:, None] * stride_t + offs_k[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


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
def _kept(seed, row, quads_per_row, first_row, first_key, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which attention weights of a tile dropout keeps: word j % 4 of Philox counter row * quads_per_row + j / 4 for key j."""
    rows = row + first_row + tl.arange(0, BLOCK_M)
    quads = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = tl.randint4x(seed, rows[:, None] * quads_per_row + quads[None, :])
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return pairs.reshape(BLOCK_M, BLOCK_N).to(tl.int32, bitcast=True) >= threshold


# --- forward: a program owns BLOCK_M queries of one head


@triton.jit
def _fwd_loop(
    acc, total, m, q, k, v, lo, hi, seed, row, quads, batch, first_query, start, shift, S, kv_head,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, window, softcap, threshold,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    c = _exponent(scale, softcap)
    for first_key in tl.range(lo, hi, BLOCK_N):
        keys = _rows(k, batch, start + first_key, start + S, kv_head, stride_kb, stride_kt, stride_kh, HEAD, BLOCK_N, BLOCK_K)
        s = _capped(tl.dot(q, keys.T, input_precision="ieee"), scale, softcap)
        if IS_EDGE:
            queries = first_query + tl.arange(0, BLOCK_M)
            seen = _visible(queries[:, None], (first_key + tl.arange(0, BLOCK_N))[None, :], shift, window)
            s = tl.where(seen, s, -float("inf"))
        p, shrink, m = _weights(s, m, c, IS_EDGE)
        total = total * shrink + tl.sum(p, 1)
        if seed is not None:
            p = tl.where(_kept(seed, row, quads, first_query, first_key, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        values = _rows(v, batch, start + first_key, start + S, kv_head, stride_vb, stride_vt, stride_vh, HEAD, BLOCK_N, BLOCK_K)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total, m


@triton.jit
def _causal_attention_fwd_kernel(
    q_ptr, k, v, work_ptr, cu_seqlens_ptr, seed_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    T, S, H, group, tiles, heads, heads_at_once, scale, window, softcap, threshold, keep,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, batch, head, start, queries, keys = _place(
        work_ptr, cu_seqlens_ptr, T, S, H, tiles, heads, heads_at_once, BLOCK_M, False
    )
    first, shift = tile * BLOCK_M, keys - queries
    q = _rows(q_ptr, batch, start + first, start + queries, head, stride_qb, stride_qt, stride_qh, HEAD, BLOCK_M, BLOCK_K)
    row = (batch * H + head).to(tl.int64) * T + start
    seed, quads = None if seed_ptr is None else tl.load(seed_ptr), tl.cdiv(S, 4)

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    total, m = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    lo, inner_lo, inner_hi, hi = _key_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for stage in tl.static_range(3):
        # Keys at the window's edge, keys that every query of the tile sees, keys at the diagonal.
        if stage > 0 or window is not None:
            acc, total, m = _fwd_loop(
                acc, total, m, q, k, v,
                lo if stage == 0 else inner_lo if stage == 1 else inner_hi,
                inner_lo if stage == 0 else inner_hi if stage == 1 else hi,
                seed, row, quads, batch, first, start, shift, keys, head // group,
                stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, window, softcap, threshold,
                stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    offs = first + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + row + offs, (m + tl.log2(total)) * LN2, mask=offs < queries)
    o = acc / (total if keep is None else total * keep)[:, None]
    _store_rows(
        o_ptr, o, batch, start + first, start + queries, head, T.to(tl.int64) * H * HEAD, H * HEAD, HEAD, HEAD, BLOCK_M, BLOCK_K
    )


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


# --- backward: a program owns BLOCK_M queries (dq, and delta for the other kernel), or BLOCK_N keys (dk and dv)


@triton.jit
def _dscores(s, dp, lse, delta, scale, softcap):
    """Weights p and the gradient of the scores, from capped scores s."""
    p = tl.exp2(s * _exponent(scale, softcap) - lse)
    ds = p * (dp - delta)
    if softcap is not None:
        ds *= 1 - (s / softcap) * (s / softcap)
    return p, ds


@triton.jit
def _dq_loop(
    dq, q, do, lse, delta, k, v, lo, hi, seed, row, quads, batch, first_query, start, shift, S, kv_head,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, window, softcap, threshold, keep,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for first_key in tl.range(lo, hi, BLOCK_N):
        keys = _rows(k, batch, start + first_key, start + S, kv_head, stride_kb, stride_kt, stride_kh, HEAD, BLOCK_N, BLOCK_K)
        values = _rows(v, batch, start + first_key, start + S, kv_head, stride_vb, stride_vt, stride_vh, HEAD, BLOCK_N, BLOCK_K)
        s = _capped(tl.dot(q, keys.T, input_precision="ieee"), scale, softcap)
        dp = tl.dot(do, values.T, input_precision="ieee")
        if seed is not None:
            kept = _kept(seed, row, quads, first_query, first_key, threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(kept, dp / keep, 0.0)
        _, ds = _dscores(s, dp, lse[:, None], delta[:, None], scale, softcap)
        if IS_EDGE:
            queries = first_query + tl.arange(0, BLOCK_M)
            ds = tl.where(_visible(queries[:, None], (first_key + tl.arange(0, BLOCK_N))[None, :], shift, window), ds, 0.0)
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _causal_attention_bwd_dq_kernel(
    do_ptr, dlse_ptr, q_ptr, k, v, o_ptr, lse_ptr, work_ptr, cu_seqlens_ptr, seed_ptr, delta_ptr, dq_ptr,
    stride_dob, stride_dot, stride_doh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dqb, stride_dqt,
    T, S, H, group, tiles, heads, heads_at_once, scale, window, softcap, threshold, keep,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, batch, head, start, queries, keys = _place(
        work_ptr, cu_seqlens_ptr, T, S, H, tiles, heads, heads_at_once, BLOCK_M, False
    )
    first, shift = tile * BLOCK_M, keys - queries
    begin, end = start + first, start + queries
    row = (batch * H + head).to(tl.int64) * T + start
    offs = first + tl.arange(0, BLOCK_M)
    do = _rows(do_ptr, batch, begin, end, head, stride_dob, stride_dot, stride_doh, HEAD, BLOCK_M, BLOCK_K)
    o = _rows(o_ptr, batch, begin, end, head, T.to(tl.int64) * H * HEAD, H * HEAD, HEAD, HEAD, BLOCK_M, BLOCK_K)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs, mask=offs < queries, other=0.0)
    tl.store(delta_ptr + row + offs, delta, mask=offs < queries)

    q = _rows(q_ptr, batch, begin, end, head, stride_qb, stride_qt, stride_qh, HEAD, BLOCK_M, BLOCK_K)
    # Past the last query p = exp2(s - inf) = 0.
    lse = tl.load(lse_ptr + row + offs, mask=offs < queries, other=float("inf")) * LOG2E
    seed, quads = None if seed_ptr is None else tl.load(seed_ptr), tl.cdiv(S, 4)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    lo, inner_lo, inner_hi, hi = _key_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for stage in tl.static_range(3):
        if stage > 0 or window is not None:
            dq = _dq_loop(
                dq, q, do, lse, delta, k, v,
                lo if stage == 0 else inner_lo if stage == 1 else inner_hi,
                inner_lo if stage == 0 else inner_hi if stage == 1 else hi,
                seed, row, quads, batch, first, start, shift, keys, head // group,
                stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, window, softcap, threshold, keep,
                stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    _store_rows(dq_ptr, dq * scale, batch, begin, end, head, stride_dqb, stride_dqt, HEAD, HEAD, BLOCK_M, BLOCK_K)


@triton.jit
def _dkdv_loop(
    dk, dv, keys, values, q, do, lses, deltas, lo, hi, seed, index, total, quads, batch, head,
    first_key, start, shift, T,
    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh, scale, window, softcap, threshold, keep,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for first in tl.range(lo, hi, BLOCK_M):
        offs = first + tl.arange(0, BLOCK_M)
        queries = _rows(q, batch, start + first, start + T, head, stride_qb, stride_qt, stride_qh, HEAD, BLOCK_M, BLOCK_K)
        lse = _statistics(lses, index, start + first, start + T, total, float("inf"), BLOCK_M) * LOG2E
        s = _capped(tl.dot(keys, queries.T, input_precision="ieee"), scale, softcap)
        dos = _rows(do, batch, start + first, start + T, head, stride_dob, stride_dot, stride_doh, HEAD, BLOCK_M, BLOCK_K)
        dp = tl.dot(values, dos.T, input_precision="ieee")
        delta = _statistics(deltas, index, start + first, start + T, total, 0.0, BLOCK_M)
        if seed is not None:
            kept = tl.trans(
                _kept(seed, index.to(tl.int64) * total + start, quads, first, first_key, threshold, BLOCK_M, BLOCK_N)
            )
            dp = tl.where(kept, dp / keep, 0.0)
        p, ds = _dscores(s, dp, lse[None, :], delta[None, :], scale, softcap)
        if IS_EDGE:
            seen = _visible(offs[None, :], (first_key + tl.arange(0, BLOCK_N))[:, None], shift, window)
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
        if seed is not None:
            p = tl.where(kept, p / keep, 0.0)
        dv = tl.dot(p.to(dos.dtype), dos, dv, input_precision="ieee")
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _causal_attention_bwd_dkdv_kernel(
    do, q, k_ptr, v_ptr, lse, delta, work_ptr, cu_seqlens_ptr, seed_ptr, dk_ptr, dv_ptr,
    stride_dob, stride_dot, stride_doh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dkb, stride_dkt,
    T, S, H, group, tiles, heads, heads_at_once, scale, window, softcap, threshold, keep,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, batch, kv_head, start, queries, keys = _place(
        work_ptr, cu_seqlens_ptr, T, S, H // group, tiles, heads, heads_at_once, BLOCK_N, True
    )
    first, shift = tile * BLOCK_N, keys - queries
    begin, end = start + first, start + keys
    k = _rows(k_ptr, batch, begin, end, kv_head, stride_kb, stride_kt, stride_kh, HEAD, BLOCK_N, BLOCK_K)
    v = _rows(v_ptr, batch, begin, end, kv_head, stride_vb, stride_vt, stride_vh, HEAD, BLOCK_N, BLOCK_K)
    seed, quads = None if seed_ptr is None else tl.load(seed_ptr), tl.cdiv(S, 4)
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    lo, inner_lo, inner_hi, hi = _query_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for head in range(kv_head * group, kv_head * group + group):
        for stage in tl.static_range(3):
            # Queries at the diagonal, queries that see every key of the tile, queries whose window ends in it.
            if stage < 2 or window is not None:
                dk, dv = _dkdv_loop(
                    dk, dv, k, v, q, do, lse, delta,
                    lo if stage == 0 else inner_lo if stage == 1 else inner_hi,
                    inner_lo if stage == 0 else inner_hi if stage == 1 else hi,
                    seed, batch * H + head, T, quads, batch, head, first, start, shift, queries,
                    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh,
                    scale, window, softcap, threshold, keep,
                    stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    _store_rows(dk_ptr, dk * scale, batch, begin, end, kv_head, stride_dkb, stride_dkt, HEAD, HEAD, BLOCK_N, BLOCK_K)
    _store_rows(dv_ptr, dv, batch, begin, end, kv_head, stride_dkb, stride_dkt, HEAD, HEAD, BLOCK_N, BLOCK_K)


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
        document += tl.sum(((begins[None, :] <= slots[:, None]) & (d < documents)[None, :]).to(tl.int32), 1)
    start = tl.load(cu_seqlens_ptr + document)
    tile = slots - (start // BLOCK + document)
    used = tile < tl.cdiv(tl.load(cu_seqlens_ptr + document + 1) - start, BLOCK)

    rank = tl.zeros((BLOCK_T,), tl.int32)
    for first in range(0, documents, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        lengths = tl.load(cu_seqlens_ptr + d + 1, mask=d < documents, other=0)
        lengths -= tl.load(cu_seqlens_ptr + d, mask=d < documents, other=0)
        more = tl.maximum(tl.cdiv(lengths, BLOCK)[None, :] - tile[:, None], 0)
        # Tiles further into their documents come first; of equal ones that of the earlier document.
        rank += tl.sum(tl.maximum(more - 1, 0) + ((more > 0) & (d[None, :] < document[:, None])).to(tl.int32), 1)
    tl.store(work_ptr + 2 * rank, document, mask=used & (rank < tiles))
    tl.store(work_ptr + 2 * rank + 1, tile, mask=used & (rank < tiles))
