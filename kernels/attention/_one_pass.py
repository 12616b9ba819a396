"""Triton kernels of the backward in one pass: one program computes dq, dk and dv of a head.

The backward in two passes (_kernels.py) computes s, p and dp of each pair of tiles twice: for dq,
and for dk and dv. One pass computes them once: 5 matmuls in place of 7, and one exp2 per score in
place of two. It also reads q, k and v once. The formulas are in causal.py.

Order      A program takes the tiles of BLOCK_N keys of its head from the first to the last. For
           each it loops over the tiles of BLOCK_M queries that see these keys:

                            keys
               queries      1 . . .      the number is the order of the columns
                            1 2 . .      a column is a loop over its tiles of queries
                            1 2 3 .
                            1 2 3 4

           dk and dv stay in registers during a column. dq / scale stays in `sums`, a float32
           buffer in memory. Column 1 stores to it, and later columns add to it. The program
           reaches the diagonal tile of a row last. It loads the sum, adds this tile's part and
           writes dq. No other kernel has to convert dq.

Repeatable A sum of floats depends on the order of the additions. The order is the same in each run:

           1. Only one program adds to a number: each program has its own part of `sums`.
           2. A column adds to each number once, because its tiles of queries do not overlap.
           3. Between two columns all threads of the program wait at a barrier. In the memory model
              of PTX every access before the barrier comes before every access after it. The
              additions are relaxed atomics, and each adds to the newest value in this order. So
              column 2 adds to what column 1 stored, column 3 adds to that, and the load at the
              diagonal reads the result of the last addition.

           All accesses to `sums` are ordinary ones (PTX: generic proxy). None is a bulk copy by
           TMA, which would need a fence between the proxies and a wait for its completion. The
           store, the additions and the load also have the same layout, so that the same thread
           accesses a number each time.

           No two threads ever add to a number at the same time. The additions are atomics because
           the L2 cache then adds. With a load and a store in place of an addition, twice as many
           bytes would move, and the program would wait for the load. A reduction by TMA would take
           as many instructions as the atomics. Atomics treat subnormal numbers as 0.

Memory     `sums` has one part per program, not one per head: a program uses its part again for its
           next head. The part, and the q and do that every column reads again, should stay in the
           L2 cache. `one_pass_fits` in _tile_choice.py checks this.

Tails      q and do are 0 after the last query, so these rows add 0. Each part of `sums` has a
           multiple of BLOCK_M rows, so it needs no mask.

Limits     As many queries as keys, as many query heads as key heads, and no documents, window,
           soft-capping or dropout. BLOCK_N must be a multiple of BLOCK_M: then the diagonal is in
           one column of a row, the last one.
"""

from ..core.tile import LOG2E
from ..core.triton import tl, triton
from ._kernels import COUNTS, _weights_and_dscores
from ._tiles import (
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
        # dq, as a vector: Triton would change the layout of a matrix twice for the addition.
        dq = tl.dot(ds.T, keys, input_precision="ieee").reshape(BLOCK_M * BLOCK_K)
        place = sums_ptr + first * BLOCK_K + tl.arange(0, BLOCK_M * BLOCK_K)
        is_later = tl.full((BLOCK_M * BLOCK_K,), first_key, tl.int32) > 0
        if IS_EDGE:
            # The additions were made in the L2 cache, so do not look in the L1 cache.
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
