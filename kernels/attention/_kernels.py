"""Kernels of causal attention: one forward, two backward.

A program owns a tile of queries of one head and walks the keys they see (forward, dq), or owns a tile of keys and walks the
queries that see them, over all query heads of its group (dk and dv). Tiles that lie wholly inside the mask take a loop without
one; those its edges cross take the same loop with it. Optional arguments are None where they do not apply, and Triton compiles
what asks for them away.
"""

from ..core.triton import tl, triton
from ._tiles import (
    LN2,
    LOG2E,
    LOWEST,
    _capped,
    _exponent,
    _kept,
    _key_range,
    _place,
    _query_range,
    _rows,
    _statistics,
    _store_rows,
    _visible,
    _weights,
)

# --- forward: a program owns BLOCK_M queries of one head


@triton.jit
def _fwd_loop(
    acc, total, m, q, k, v, lo, hi, seed, row, quads, batch, first_query, start, shift, S, kv_head,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, window, softcap, threshold,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    c = _exponent(scale, softcap)
    for first_key in tl.range(lo, hi, BLOCK_N):
        keys = _rows(
            k,
            batch,
            start + first_key,
            start + S,
            kv_head,
            stride_kb,
            stride_kt,
            stride_kh,
            HEAD,
            BLOCK_N,
            BLOCK_K,
        )
        s = _capped(tl.dot(q, keys.T, input_precision="ieee"), scale, softcap)
        if IS_EDGE:
            queries = first_query + tl.arange(0, BLOCK_M)
            seen = _visible(
                queries[:, None], (first_key + tl.arange(0, BLOCK_N))[None, :], shift, window
            )
            s = tl.where(seen, s, -float("inf"))
        p, shrink, m = _weights(s, m, c, IS_EDGE)
        total = total * shrink + tl.sum(p, 1)
        if seed is not None:
            p = tl.where(
                _kept(seed, row, quads, first_query, first_key, threshold, BLOCK_M, BLOCK_N), p, 0.0
            )
        values = _rows(
            v,
            batch,
            start + first_key,
            start + S,
            kv_head,
            stride_vb,
            stride_vt,
            stride_vh,
            HEAD,
            BLOCK_N,
            BLOCK_K,
        )
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
    q = _rows(
        q_ptr,
        batch,
        start + first,
        start + queries,
        head,
        stride_qb,
        stride_qt,
        stride_qh,
        HEAD,
        BLOCK_M,
        BLOCK_K,
    )
    row = (batch * H + head).to(tl.int64) * T + start
    seed, quads = None if seed_ptr is None else tl.load(seed_ptr), tl.cdiv(S, 4)

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    total, m = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    edges = _key_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for stage in tl.static_range(3):
        # Keys at the window's edge, keys that every query of the tile sees, keys at the diagonal.
        if stage > 0 or window is not None:
            acc, total, m = _fwd_loop(
                acc, total, m, q, k, v,
                edges[stage], edges[stage + 1], seed, row, quads, batch, first, start, shift, keys, head // group,
                stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, window, softcap, threshold,
                stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    offs = first + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + row + offs, (m + tl.log2(total)) * LN2, mask=offs < queries)
    o = acc / (total if keep is None else total * keep)[:, None]
    # tl.cast, not .to: Triton makes constants of integers that are 1, and those have no methods.
    stride_ob = tl.cast(T, tl.int64) * H * HEAD
    _store_rows(
        o_ptr,
        o,
        batch,
        start + first,
        start + queries,
        head,
        stride_ob,
        H * HEAD,
        HEAD,
        HEAD,
        BLOCK_M,
        BLOCK_K,
    )


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
        keys = _rows(
            k,
            batch,
            start + first_key,
            start + S,
            kv_head,
            stride_kb,
            stride_kt,
            stride_kh,
            HEAD,
            BLOCK_N,
            BLOCK_K,
        )
        values = _rows(
            v,
            batch,
            start + first_key,
            start + S,
            kv_head,
            stride_vb,
            stride_vt,
            stride_vh,
            HEAD,
            BLOCK_N,
            BLOCK_K,
        )
        s = _capped(tl.dot(q, keys.T, input_precision="ieee"), scale, softcap)
        dp = tl.dot(do, values.T, input_precision="ieee")
        if seed is not None:
            kept = _kept(seed, row, quads, first_query, first_key, threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(kept, dp / keep, 0.0)
        _, ds = _dscores(s, dp, lse[:, None], delta[:, None], scale, softcap)
        if IS_EDGE:
            queries = first_query + tl.arange(0, BLOCK_M)
            ds = tl.where(
                _visible(
                    queries[:, None], (first_key + tl.arange(0, BLOCK_N))[None, :], shift, window
                ),
                ds,
                0.0,
            )
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
    do = _rows(
        do_ptr, batch, begin, end, head, stride_dob, stride_dot, stride_doh, HEAD, BLOCK_M, BLOCK_K
    )
    o = _rows(
        o_ptr,
        batch,
        begin,
        end,
        head,
        tl.cast(T, tl.int64) * H * HEAD,
        H * HEAD,
        HEAD,
        HEAD,
        BLOCK_M,
        BLOCK_K,
    )
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs, mask=offs < queries, other=0.0)
    tl.store(delta_ptr + row + offs, delta, mask=offs < queries)

    q = _rows(
        q_ptr, batch, begin, end, head, stride_qb, stride_qt, stride_qh, HEAD, BLOCK_M, BLOCK_K
    )
    # Past the last query p = exp2(s - inf) = 0.
    lse = tl.load(lse_ptr + row + offs, mask=offs < queries, other=float("inf")) * LOG2E
    seed, quads = None if seed_ptr is None else tl.load(seed_ptr), tl.cdiv(S, 4)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    edges = _key_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for stage in tl.static_range(3):
        if stage > 0 or window is not None:
            dq = _dq_loop(
                dq, q, do, lse, delta, k, v,
                edges[stage], edges[stage + 1], seed, row, quads, batch, first, start, shift, keys, head // group,
                stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, window, softcap, threshold, keep,
                stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    _store_rows(
        dq_ptr,
        dq * scale,
        batch,
        begin,
        end,
        head,
        stride_dqb,
        stride_dqt,
        HEAD,
        HEAD,
        BLOCK_M,
        BLOCK_K,
    )


@triton.jit
def _dkdv_loop(
    dk, dv, keys, values, q, do, lses, deltas, lo, hi, seed, index, total, quads, batch, head,
    first_key, start, shift, T,
    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh, scale, window, softcap, threshold, keep,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for first in tl.range(lo, hi, BLOCK_M):
        offs = first + tl.arange(0, BLOCK_M)
        queries = _rows(
            q,
            batch,
            start + first,
            start + T,
            head,
            stride_qb,
            stride_qt,
            stride_qh,
            HEAD,
            BLOCK_M,
            BLOCK_K,
        )
        lse = (
            _statistics(lses, index, start + first, start + T, total, float("inf"), BLOCK_M) * LOG2E
        )
        s = _capped(tl.dot(keys, queries.T, input_precision="ieee"), scale, softcap)
        dos = _rows(
            do,
            batch,
            start + first,
            start + T,
            head,
            stride_dob,
            stride_dot,
            stride_doh,
            HEAD,
            BLOCK_M,
            BLOCK_K,
        )
        dp = tl.dot(values, dos.T, input_precision="ieee")
        delta = _statistics(deltas, index, start + first, start + T, total, 0.0, BLOCK_M)
        if seed is not None:
            kept = tl.trans(
                _kept(
                    seed,
                    index.to(tl.int64) * total + start,
                    quads,
                    first,
                    first_key,
                    threshold,
                    BLOCK_M,
                    BLOCK_N,
                )
            )
            dp = tl.where(kept, dp / keep, 0.0)
        p, ds = _dscores(s, dp, lse[None, :], delta[None, :], scale, softcap)
        if IS_EDGE:
            seen = _visible(
                offs[None, :], (first_key + tl.arange(0, BLOCK_N))[:, None], shift, window
            )
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
    k = _rows(
        k_ptr, batch, begin, end, kv_head, stride_kb, stride_kt, stride_kh, HEAD, BLOCK_N, BLOCK_K
    )
    v = _rows(
        v_ptr, batch, begin, end, kv_head, stride_vb, stride_vt, stride_vh, HEAD, BLOCK_N, BLOCK_K
    )
    seed, quads = None if seed_ptr is None else tl.load(seed_ptr), tl.cdiv(S, 4)
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    edges = _query_range(first, queries, shift, window, BLOCK_M, BLOCK_N)
    for head in range(kv_head * group, kv_head * group + group):
        for stage in tl.static_range(3):
            # Queries at the diagonal, queries that see every key of the tile, queries whose window ends in it.
            if stage < 2 or window is not None:
                dk, dv = _dkdv_loop(
                    dk, dv, k, v, q, do, lse, delta,
                    edges[stage], edges[stage + 1], seed, batch * H + head, T, quads, batch, head, first, start, shift, queries,
                    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh,
                    scale, window, softcap, threshold, keep,
                    stage != 1, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    _store_rows(
        dk_ptr,
        dk * scale,
        batch,
        begin,
        end,
        kv_head,
        stride_dkb,
        stride_dkt,
        HEAD,
        HEAD,
        BLOCK_N,
        BLOCK_K,
    )
    _store_rows(
        dv_ptr, dv, batch, begin, end, kv_head, stride_dkb, stride_dkt, HEAD, HEAD, BLOCK_N, BLOCK_K
    )
