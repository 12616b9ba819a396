"""Triton kernels of causal attention: the forward, and the backward in two passes.

The formulas are in causal.py. The backward in one pass is in _one_pass.py.

Forward    A program owns a tile of BLOCK_M queries of one head and loops over tiles of BLOCK_N
           keys, so the (T, S) scores never reach memory. The softmax of a query needs the maximum
           and the sum over all of its keys, which are known only after the last tile. The program
           therefore keeps three running values (online softmax):

               m       the largest score so far
               total   the sum of exp(score - m) so far
               acc     the sum of exp(score - m) v so far

           If a tile raises m, total and acc are first multiplied by exp(old m - new m). After the
           last tile o = acc / total and lse = m + log(total). The code has exp2 in place of exp:
           see "Base 2" in _tiles.py.

Backward   The weights are not stored. They are recomputed from the saved lse: p = exp(score - lse).
           dq sums over keys, dk and dv sum over queries, so there are two kernels. One owns a tile
           of queries and loops over keys, as the forward does; it writes dq. The other owns a tile
           of keys and loops over the queries that see them, in all query heads that share the key
           head; it writes dk and dv. Each gradient is written by one program that adds in a fixed
           order. There are no atomics: results are the same bits in every run.

Mask       The keys that a tile of queries sees form a band. Only tiles on an edge of the band need
           the mask. For 4 tiles of queries and keys, and a window of 2 tiles:

                            keys
               queries      D . . .      D: diagonal, masked
                            I D . .      I: interior, every query sees every key, no mask
                            W I D .      W: window's edge, masked
                            . W I D      .: skipped

           A loop runs up to three times, over the ranges W, I and D, and evaluates the mask in W
           and D only (IS_EDGE).

Names      q, k, v, do, lse, delta without _ptr may be TMA descriptors, see _tiles.py.
           start      first token of the program's sequence or document
           shift      keys minus queries of it, S - T
           group      query heads per key head, H / G
           heads      heads of all sequences: B H, or B G in the kernel that owns keys
           row        index of query 0 of this head in (B, H, T): addresses lse, counts random words
           row_keys   keys per row of random words: S, also for a document
           threshold  a weight is kept if its random word is not below it
           keep       1 - dropout_p
           sums       partial sums over the tokens of a tile, for the gradient of a bias of qkv

Options that do not apply are None. Triton compiles a kernel without the code that uses them.
With dropout, `kept` is True for the weights to keep.
"""

from ..core.tile import LN2, LOG2E
from ..core.triton import tl, triton
from ._tiles import (
    LOWEST,
    _capped_scores,
    _dropout_mask,
    _exp2_scale,
    _is_visible,
    _key_range,
    _load_rows,
    _load_statistics,
    _locate,
    _query_range,
    _softmax_step,
    _store_column_sums,
    _store_rows,
)

# Triton compiles a kernel again if an integer argument is 1 or a multiple of 16. It does not for
# these arguments. It does for strides, whose alignment allows wide loads, and for `group`, where 1
# removes a loop.
COUNTS = ["T", "S", "H", "tiles", "heads", "heads_at_once", "window", "threshold"]

# --- forward: a program owns BLOCK_M queries of one head


@triton.jit
def _fwd_loop(
    acc, total, m, q, k, v, lo, hi, seed, row, row_keys,
    batch, first_query, start, shift, S, kv_head,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    scale, window, softcap, threshold,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add keys [lo, hi) to the running values of a tile of queries."""
    c = _exp2_scale(scale, softcap)
    for first_key in tl.range(lo, hi, BLOCK_N):
        begin, end = start + first_key, start + S
        # Scores of a tile.
        keys = _load_rows(
            k, batch, begin, end, kv_head, stride_kb, stride_kt, stride_kh, HEAD, BLOCK_N, BLOCK_K
        )
        s = _capped_scores(tl.dot(q, keys.T, input_precision="ieee"), scale, softcap)
        if IS_EDGE:
            queries = first_query + tl.arange(0, BLOCK_M)
            offs_n = first_key + tl.arange(0, BLOCK_N)
            seen = _is_visible(queries[:, None], offs_n[None, :], shift, window)
            s = tl.where(seen, s, -float("inf"))
        # Weights. The sum is taken before dropout: lse does not depend on dropout.
        p, shrink, m = _softmax_step(s, m, c, IS_EDGE)
        total = total * shrink + tl.sum(p, 1)
        if seed is not None:
            kept = _dropout_mask(
                seed, row, row_keys, first_query, first_key, threshold, BLOCK_M, BLOCK_N
            )
            p = tl.where(kept, p, 0.0)
        # Weighted sum of the values.
        values = _load_rows(
            v, batch, begin, end, kv_head, stride_vb, stride_vt, stride_vh, HEAD, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total, m


@triton.jit(do_not_specialize=COUNTS)
def _causal_attention_fwd_kernel(
    q_ptr, k, v, work_ptr, cu_seqlens_ptr, seed_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    T, S, H, group, tiles, heads, heads_at_once, scale, window, softcap, threshold, keep,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Find this program's tile and load its queries.
    tile, batch, head, _, start, queries, keys = _locate(
        work_ptr, cu_seqlens_ptr, T, S, H, tiles, heads, heads_at_once, BLOCK_M, False
    )
    first, shift = tile * BLOCK_M, keys - queries
    begin, end = start + first, start + queries
    q = _load_rows(
        q_ptr, batch, begin, end, head, stride_qb, stride_qt, stride_qh, HEAD, BLOCK_M, BLOCK_K
    )
    row = (batch * H + head).to(tl.int64) * T + start
    seed = None if seed_ptr is None else tl.load(seed_ptr)

    # Loop over the keys: the window's edge, the interior, the diagonal.
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    total, m = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    edges = _key_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for stage in tl.static_range(3):
        if stage > 0 or window is not None:
            acc, total, m = _fwd_loop(
                acc, total, m, q, k, v, edges[stage], edges[stage + 1], seed, row, S,
                batch, first, start, shift, keys, head // group,
                stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                scale, window, softcap, threshold,
                stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip

    # Normalize and store. lse is stored in natural logarithm, m is in base 2.
    offs = first + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + row + offs, (m + tl.log2(total)) * LN2, mask=offs < queries)
    o = acc / (total if keep is None else total * keep)[:, None]
    # tl.cast, not .to: Triton makes an integer argument of 1 a constant, which has no methods.
    stride_ob = tl.cast(T, tl.int64) * H * HEAD
    _store_rows(
        o_ptr, o, batch, begin, end, head, stride_ob, H * HEAD, HEAD, HEAD, BLOCK_M, BLOCK_K
    )


# --- backward: a program owns BLOCK_M queries (dq, delta) or BLOCK_N keys (dk, dv)


@triton.jit
def _weights_and_dscores(s, dp, lse, delta, scale, softcap):
    """Return p and ds of causal.py. `s` is from _capped_scores, `lse` is in base 2."""
    p = tl.exp2(s * _exp2_scale(scale, softcap) - lse)
    ds = p * (dp - delta)
    if softcap is not None:
        ds *= 1 - (s / softcap) * (s / softcap)
    return p, ds


@triton.jit
def _dq_loop(
    dq, q, do, lse, delta, k, v, lo, hi, seed, row, row_keys,
    batch, first_query, start, shift, S, kv_head,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    scale, window, softcap, threshold, keep,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the contribution of keys [lo, hi) to dq / scale."""
    for first_key in tl.range(lo, hi, BLOCK_N):
        begin, end = start + first_key, start + S
        keys = _load_rows(
            k, batch, begin, end, kv_head, stride_kb, stride_kt, stride_kh, HEAD, BLOCK_N, BLOCK_K
        )
        values = _load_rows(
            v, batch, begin, end, kv_head, stride_vb, stride_vt, stride_vh, HEAD, BLOCK_N, BLOCK_K
        )
        # Scores, and the gradient of the weights.
        s = _capped_scores(tl.dot(q, keys.T, input_precision="ieee"), scale, softcap)
        dp = tl.dot(do, values.T, input_precision="ieee")
        if seed is not None:
            kept = _dropout_mask(
                seed, row, row_keys, first_query, first_key, threshold, BLOCK_M, BLOCK_N
            )
            dp = tl.where(kept, dp / keep, 0.0)
        # Gradient of the scores, zero where masked.
        _, ds = _weights_and_dscores(s, dp, lse[:, None], delta[:, None], scale, softcap)
        if IS_EDGE:
            queries = first_query + tl.arange(0, BLOCK_M)
            offs_n = first_key + tl.arange(0, BLOCK_N)
            seen = _is_visible(queries[:, None], offs_n[None, :], shift, window)
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=COUNTS)
def _causal_attention_bwd_dq_kernel(
    do_ptr, dlse_ptr, q_ptr, k, v, o_ptr, lse_ptr, work_ptr, cu_seqlens_ptr, seed_ptr,
    delta_ptr, dq_ptr, dq_sums_ptr,
    stride_dob, stride_dot, stride_doh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dqb, stride_dqt,
    T, S, H, group, tiles, heads, heads_at_once, scale, window, softcap, threshold, keep,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Find this program's tile of queries.
    tile, batch, head, partial_row, start, queries, keys = _locate(
        work_ptr, cu_seqlens_ptr, T, S, H, tiles, heads, heads_at_once, BLOCK_M, False
    )
    first, shift = tile * BLOCK_M, keys - queries
    begin, end = start + first, start + queries
    row = (batch * H + head).to(tl.int64) * T + start
    offs = first + tl.arange(0, BLOCK_M)

    # delta = sum(do * o) - dlse, also for the kernel that owns keys.
    do = _load_rows(
        do_ptr, batch, begin, end, head, stride_dob, stride_dot, stride_doh, HEAD, BLOCK_M, BLOCK_K
    )
    stride_ob = tl.cast(T, tl.int64) * H * HEAD
    o = _load_rows(
        o_ptr, batch, begin, end, head, stride_ob, H * HEAD, HEAD, HEAD, BLOCK_M, BLOCK_K
    )
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs, mask=offs < queries, other=0.0)
    tl.store(delta_ptr + row + offs, delta, mask=offs < queries)

    # Loop over the keys: the window's edge, the interior, the diagonal.
    q = _load_rows(
        q_ptr, batch, begin, end, head, stride_qb, stride_qt, stride_qh, HEAD, BLOCK_M, BLOCK_K
    )
    # After the last query lse is inf: p = exp2(s - inf) = 0.
    lse = tl.load(lse_ptr + row + offs, mask=offs < queries, other=float("inf")) * LOG2E
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    edges = _key_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for stage in tl.static_range(3):
        if stage > 0 or window is not None:
            dq = _dq_loop(
                dq, q, do, lse, delta, k, v, edges[stage], edges[stage + 1], seed, row, S,
                batch, first, start, shift, keys, head // group,
                stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                scale, window, softcap, threshold, keep,
                stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    dq *= scale
    _store_rows(
        dq_ptr, dq, batch, begin, end, head, stride_dqb, stride_dqt, HEAD, HEAD, BLOCK_M, BLOCK_K
    )
    if dq_sums_ptr is not None:
        # Rows past the end are 0: so are their q and do.
        _store_column_sums(dq_sums_ptr, dq, partial_row, head, H, HEAD, BLOCK_K)


@triton.jit
def _dkdv_loop(
    dk, dv, keys, values, q, do, lses, deltas, lo, hi, seed, index, total, row_keys,
    batch, head, first_key, start, shift, T,
    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh,
    scale, window, softcap, threshold, keep,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the contribution of queries [lo, hi) of one query head to dk / scale and dv.

    Tiles are transposed: (BLOCK_N keys, BLOCK_M queries).
    """
    for first in tl.range(lo, hi, BLOCK_M):
        begin, end = start + first, start + T
        offs = first + tl.arange(0, BLOCK_M)
        # Scores.
        queries = _load_rows(
            q, batch, begin, end, head, stride_qb, stride_qt, stride_qh, HEAD, BLOCK_M, BLOCK_K
        )
        lse = _load_statistics(lses, q, index, begin, end, total, float("inf"), BLOCK_M) * LOG2E
        s = _capped_scores(tl.dot(keys, queries.T, input_precision="ieee"), scale, softcap)
        # Gradient of the weights.
        dos = _load_rows(
            do, batch, begin, end, head, stride_dob, stride_dot, stride_doh, HEAD, BLOCK_M, BLOCK_K
        )
        dp = tl.dot(values, dos.T, input_precision="ieee")
        delta = _load_statistics(deltas, do, index, begin, end, total, 0.0, BLOCK_M)
        if seed is not None:
            row = index.to(tl.int64) * total + start
            kept = _dropout_mask(seed, row, row_keys, first, first_key, threshold, BLOCK_M, BLOCK_N)
            kept = tl.trans(kept)
            dp = tl.where(kept, dp / keep, 0.0)
        # Weights and the gradient of the scores, zero where masked.
        p, ds = _weights_and_dscores(s, dp, lse[None, :], delta[None, :], scale, softcap)
        if IS_EDGE:
            offs_n = first_key + tl.arange(0, BLOCK_N)
            seen = _is_visible(offs[None, :], offs_n[:, None], shift, window)
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
        if seed is not None:
            p = tl.where(kept, p / keep, 0.0)
        dv = tl.dot(p.to(dos.dtype), dos, dv, input_precision="ieee")
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def _causal_attention_bwd_dkdv_kernel(
    do, q, k_ptr, v_ptr, lse, delta, work_ptr, cu_seqlens_ptr, seed_ptr,
    dk_ptr, dv_ptr, dkv_sums_ptr,
    stride_dob, stride_dot, stride_doh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dkb, stride_dkt,
    T, S, H, group, tiles, heads, heads_at_once, scale, window, softcap, threshold, keep,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Find this program's tile of keys, load them and their values.
    tile, batch, kv_head, partial_row, start, queries, keys = _locate(
        work_ptr, cu_seqlens_ptr, T, S, H // group, tiles, heads, heads_at_once, BLOCK_N, True
    )
    first, shift = tile * BLOCK_N, keys - queries
    begin, end = start + first, start + keys
    k = _load_rows(
        k_ptr, batch, begin, end, kv_head, stride_kb, stride_kt, stride_kh, HEAD, BLOCK_N, BLOCK_K
    )
    v = _load_rows(
        v_ptr, batch, begin, end, kv_head, stride_vb, stride_vt, stride_vh, HEAD, BLOCK_N, BLOCK_K
    )
    seed = None if seed_ptr is None else tl.load(seed_ptr)

    # Loop over the query heads of the group, and in each over the queries: the diagonal, the
    # interior, the window's edge.
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    edges = _query_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for head in range(kv_head * group, kv_head * group + group):
        for stage in tl.static_range(3):
            if stage < 2 or window is not None:
                dk, dv = _dkdv_loop(
                    dk, dv, k, v, q, do, lse, delta, edges[stage], edges[stage + 1],
                    seed, batch * H + head, T, S, batch, head, first, start, shift, queries,
                    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh,
                    scale, window, softcap, threshold, keep,
                    stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    dk *= scale
    _store_rows(
        dk_ptr, dk, batch, begin, end, kv_head, stride_dkb, stride_dkt, HEAD, HEAD, BLOCK_N, BLOCK_K
    )
    _store_rows(
        dv_ptr, dv, batch, begin, end, kv_head, stride_dkb, stride_dkt, HEAD, HEAD, BLOCK_N, BLOCK_K
    )
    if dkv_sums_ptr is not None:
        # Rows past the end are 0: no query sees their keys.
        G = H // group
        _store_column_sums(dkv_sums_ptr, dk, partial_row, kv_head, 2 * G, HEAD, BLOCK_K)
        _store_column_sums(dkv_sums_ptr, dv, partial_row, G + kv_head, 2 * G, HEAD, BLOCK_K)
