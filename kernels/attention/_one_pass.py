"""Triton kernel of the backward in one pass: dq, dk and dv of a head from one program.

_kernels.py makes two passes over the tiles of scores: one for dq, one for dk and dv. Both compute
s, p and dp. One pass computes them once: 5 matmuls and one exp2 per score in place of 7 and 2. It
also reads q, k, v and do once. The formulas are in causal.py.

Order      A program owns a head. It takes the tiles of BLOCK_N keys in ascending order. For each it
           loops over the tiles of BLOCK_M queries that see these keys:

                            keys
               queries      1 . . .      1 to 4: order of the columns
                            1 2 . .      a column is one loop over queries, downwards
                            1 2 3 .
                            1 2 3 4

           dk and dv stay in registers during a column. dq / scale of all queries is in `sums`, a
           float32 buffer: column 1 stores, later columns add, and the diagonal, which is the last
           tile of a row, adds in registers and writes dq. No other kernel has to convert it.

Repeatable The additions to one number of `sums` have one order in every run:
           1. One program makes all of them. Each program has a part of `sums` of its own.
           2. In one column it adds to each number at most once.
           3. A barrier stands between two columns. In the memory model of PTX a barrier orders all
              earlier accesses of a program's threads before all later ones. Additions are atomic
              and relaxed, so each one adds to the result of the one before it. The load at the
              diagonal sees the last one. The model needs no fence for this: all accesses are
              ordinary (generic proxy), none is a bulk copy.
           The store, the additions and the load also have the same layout, one row of numbers, so
           that the same thread accesses a number each time.
           Additions are atomic only because the GPU then adds in the L2 cache: a load would make
           the program wait, and a load and a store move twice as many bytes.

Memory     `sums` has one part per program, not per head, and a program uses it again for its next
           head. It should stay in the L2 cache, with the q and do that later columns read again.
           `one_pass_fits` in _tile_choice.py checks this.

Tails      Rows past the last query are 0 in q and do, so they add 0. A part of `sums` has a
           multiple of BLOCK_M rows and needs no masks.

Limits     As many queries as keys, as many query heads as key heads, one sequence per batch entry;
           no window, soft-capping or dropout. BLOCK_N is a multiple of BLOCK_M.
"""

from ..core.triton import tl, triton
from ._kernels import COUNTS, _weights_and_dscores
from ._tiles import (
    LOG2E,
    _is_visible,
    _load_rows,
    _load_statistics,
    _store_column_sums,
    _store_rows,
)


@triton.jit(do_not_specialize=COUNTS)
def _causal_attention_bwd_delta_kernel(
    do_ptr, dlse_ptr, o_ptr, delta_ptr,
    stride_dob, stride_dot, stride_doh,
    T, H, tiles,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write delta = sum(do * o) - dlse. A program owns BLOCK_M queries of one head."""
    # Adjacent programs read adjacent heads, which are next to each other in memory.
    pid = tl.program_id(0)
    head, tile, batch = pid % H, pid // H % tiles, pid // (H * tiles)
    first = tile * BLOCK_M
    do = _load_rows(
        do_ptr, batch, first, T, head, stride_dob, stride_dot, stride_doh, HEAD, BLOCK_M, BLOCK_K
    )
    stride_ob = tl.cast(T, tl.int64) * H * HEAD
    o = _load_rows(o_ptr, batch, first, T, head, stride_ob, H * HEAD, HEAD, HEAD, BLOCK_M, BLOCK_K)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    row = (batch * H + head).to(tl.int64) * T
    offs = first + tl.arange(0, BLOCK_M)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs, mask=offs < T, other=0.0)
    tl.store(delta_ptr + row + offs, delta, mask=offs < T)


@triton.jit
def _one_pass_loop(
    dk, dv, keys, values, q, do, lses, deltas, sums_ptr, dq_ptr, dq_sums_ptr, lo, hi,
    batch, head, H, first_key, T,
    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh, stride_dqb, stride_dqt,
    scale,
    IS_EDGE: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the contribution of queries [lo, hi) to dk / scale and dv, and of these keys to dq.

    Tiles are transposed: (BLOCK_N keys, BLOCK_M queries).
    """
    index = batch * H + head
    for first in tl.range(lo, hi, BLOCK_M):
        # Scores, the gradient of the weights, weights, and the gradient of the scores.
        queries = _load_rows(
            q, batch, first, T, head, stride_qb, stride_qt, stride_qh, HEAD, BLOCK_M, BLOCK_K
        )
        lse = _load_statistics(lses, q, index, first, T, T, float("inf"), BLOCK_M) * LOG2E
        s = tl.dot(keys, queries.T, input_precision="ieee")
        dos = _load_rows(
            do, batch, first, T, head, stride_dob, stride_dot, stride_doh, HEAD, BLOCK_M, BLOCK_K
        )
        dp = tl.dot(values, dos.T, input_precision="ieee")
        delta = _load_statistics(deltas, do, index, first, T, T, 0.0, BLOCK_M)
        p, ds = _weights_and_dscores(s, dp, lse[None, :], delta[None, :], scale, None)
        if IS_EDGE:
            offs_m, offs_n = first + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
            seen = _is_visible(offs_m[None, :], offs_n[:, None], 0, None)
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
        # dk and dv, in registers.
        dv = tl.dot(p.to(dos.dtype), dos, dv, input_precision="ieee")
        ds = ds.to(queries.dtype)
        dk = tl.dot(ds, queries, dk, input_precision="ieee")
        # dq. As a matrix it would change its layout twice: once more before the addition.
        dq = tl.dot(ds.T, keys, input_precision="ieee").reshape(BLOCK_M * BLOCK_K)
        place = sums_ptr + first * BLOCK_K + tl.arange(0, BLOCK_M * BLOCK_K)
        is_later = tl.full((BLOCK_M * BLOCK_K,), first_key, tl.int32) > 0
        if IS_EDGE:
            # The L1 cache may hold numbers of the head before: load from the L2 cache.
            dq += tl.load(place, mask=is_later, other=0.0, cache_modifier=".cg")
            dq = dq.reshape(BLOCK_M, BLOCK_K) * scale
            _store_rows(
                dq_ptr, dq, batch, first, T, head, stride_dqb, stride_dqt, HEAD,
                HEAD, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            if dq_sums_ptr is not None:
                row = batch * tl.cdiv(T, BLOCK_M) + first // BLOCK_M
                _store_column_sums(dq_sums_ptr, dq, row, head, H, HEAD, BLOCK_K)
        else:
            tl.store(place, dq, mask=is_later == 0)
            tl.atomic_add(place, dq, mask=is_later, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def _causal_attention_bwd_one_pass_kernel(
    do, q, k, v, lse, delta, sums_ptr, dq_ptr, dk_ptr, dv_ptr, dq_sums_ptr, dkv_sums_ptr,
    stride_dob, stride_dot, stride_doh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_dqb, stride_dqt, stride_dkb, stride_dkt,
    T, H, heads, scale,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dq, dk and dv of the heads that this program owns: every num_programs-th one."""
    rows = tl.cdiv(T, BLOCK_M) * BLOCK_M
    sums_ptr += tl.program_id(0).to(tl.int64) * rows * BLOCK_K
    for index in tl.range(tl.program_id(0), heads, tl.num_programs(0)):
        batch, head = index // H, index % H
        for first in tl.range(0, T, BLOCK_N):
            keys = _load_rows(
                k, batch, first, T, head, stride_kb, stride_kt, stride_kh, HEAD, BLOCK_N, BLOCK_K
            )
            values = _load_rows(
                v, batch, first, T, head, stride_vb, stride_vt, stride_vh, HEAD, BLOCK_N, BLOCK_K
            )
            # Loop over the queries: the diagonal, then those that see every key of the tile.
            dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            dv = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            end = tl.minimum(first + BLOCK_N, T)
            for stage in tl.static_range(2):
                dk, dv = _one_pass_loop(
                    dk, dv, keys, values, q, do, lse, delta, sums_ptr, dq_ptr, dq_sums_ptr,
                    first if stage == 0 else end, end if stage == 0 else T,
                    batch, head, H, first, T,
                    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh,
                    stride_dqb, stride_dqt, scale,
                    stage == 0, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            # Write dk and dv.
            dk *= scale
            _store_rows(
                dk_ptr, dk, batch, first, T, head, stride_dkb, stride_dkt, HEAD,
                HEAD, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            _store_rows(
                dv_ptr, dv, batch, first, T, head, stride_dkb, stride_dkt, HEAD,
                HEAD, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if dkv_sums_ptr is not None:
                row = batch * tl.cdiv(T, BLOCK_N) + first // BLOCK_N
                _store_column_sums(dkv_sums_ptr, dk, row, head, 2 * H, HEAD, BLOCK_K)
                _store_column_sums(dkv_sums_ptr, dv, row, H + head, 2 * H, HEAD, BLOCK_K)
            # Order the additions of this column before those of the next one.
            tl.debug_barrier()
