"""The definition of causal attention in PyTorch: what attention.py says, one block of queries' scores at a time.

Beside each function that computes stands one that only allocates what it returns, `shapes_*`: blocks are a Python loop over the
queries, which torch.compile would unroll for each length anew.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.layout import wide
from ..core.op import can_read_values
from ..core.philox import random_bits
from ..core.triton import cdiv

# Scores of this many queries at a time: the causal half is skipped, and a block's scores stay near the cache.
BLOCK_QUERIES = 128


def check_documents(name: str, cu_seqlens: Tensor | None, N: int) -> None:
    """Raise for documents that do not follow one another within N tokens, where looking costs no synchronization."""
    if cu_seqlens is None or not can_read_values(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > N or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"{name}: cu_seqlens must rise from 0 to at most the {N} tokens, got "
            f"{cu_seqlens.tolist()[:20]}; give the sums of the documents' lengths"
        )


def reference_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o in q's dtype and lse (B, H, T).

    With cu_seqlens B is 1, its documents do not see one another, and tokens of no document have zeros, as have their gradients.
    """
    check_documents("causal_attention_varlen", cu_seqlens, q.shape[1])
    o, lse = _attend(
        _by_head(q), _by_head(k), _by_head(v), cu_seqlens, seed, scale, window, softcap, dropout_p
    )
    return _by_token(o, q.dtype), lse


def shapes_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Room for what `reference_fwd` returns."""
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(
        (B, H, T), dtype=torch.promote_types(q.dtype, torch.float32)
    )


def reference_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv."""
    do, o, *heads = (_by_head(x) for x in (do, o, q, k, v))
    grads = tuple(torch.zeros_like(x) for x in heads)
    _fill_grads(grads, do, dlse, o, *heads, cu_seqlens, seed, scale, window, softcap, dropout_p)
    return tuple(_by_token(grad, q.dtype) for grad in grads)


def shapes_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for what `reference_bwd` returns."""
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def reference_qkvpacked_fwd(
    qkv: Tensor, n_head: int, n_kv_head: int, cu_seqlens: Tensor | None, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o (B, T, H K) and lse of q, k and v lying side by side in the last axis of qkv."""
    check_documents("causal_attention_qkvpacked", cu_seqlens, qkv.shape[1])
    counts = n_head, n_kv_head, n_kv_head
    heads = _by_head(qkv.unflatten(-1, (sum(counts), -1)))
    o, lse = _attend(*heads.split(counts), cu_seqlens, seed, scale, window, softcap, dropout_p)
    return _by_token(o, qkv.dtype).flatten(2), lse


def shapes_qkvpacked_fwd(
    qkv: Tensor, n_head: int, n_kv_head: int, cu_seqlens: Tensor | None, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Room for what `reference_qkvpacked_fwd` returns."""
    B, T, width = qkv.shape
    lse = qkv.new_empty((B, n_head, T), dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty((B, T, width // (n_head + 2 * n_kv_head) * n_head)), lse


def reference_qkvpacked_bwd(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    n_head: int, n_kv_head: int, scale: float, window: int, softcap: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Return dqkv, laid out as qkv."""
    counts = n_head, n_kv_head, n_kv_head
    heads = _by_head(qkv.unflatten(-1, (sum(counts), -1)))
    do, o = (_by_head(x.unflatten(-1, (n_head, -1))) for x in (do, o))
    dheads = torch.zeros_like(heads)
    _fill_grads(
        dheads.split(counts),
        do,
        None,
        o,
        *heads.split(counts),
        cu_seqlens,
        seed,
        scale,
        window,
        softcap,
        dropout_p,
    )
    return _by_token(dheads, qkv.dtype).flatten(2)


def shapes_qkvpacked_bwd(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    n_head: int, n_kv_head: int, scale: float, window: int, softcap: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Room for what `reference_qkvpacked_bwd` returns."""
    return qkv.new_empty(qkv.shape)


def _by_head(x: Tensor) -> Tensor:
    """(B, T, H, K) as (H, B, T, K) in at least float32, contiguous."""
    return wide(x).permute(2, 0, 1, 3).contiguous()


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(H, B, T, K) as (B, T, H, K), contiguous."""
    return x.permute(1, 2, 0, 3).to(dtype).contiguous()


def _flat(x: Tensor, H: int) -> Tensor:
    """(G, B, T, K) as (H B, T, K), each head repeated for its group of H / G."""
    G = x.shape[0]
    return (x if G == H else x.repeat_interleave(H // G, 0)).flatten(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (H, B, T, K) and lse (B, H, T) of q (H, B, T, K), k and v (G, B, S, K)."""
    (H, B, T, _), S = q.shape, k.shape[2]
    o, lse, starts = torch.zeros_like(q), q.new_zeros(H * B, T), _starts(cu_seqlens)
    q, k, v = _flat(q, H), _flat(k, H), _flat(v, H)
    for rows, keys, mask in _blocks(T, S, window, starts, q):
        t = _scores(q[:, rows], k[:, keys], mask, scale, softcap)
        # PyTorch's softmax takes half the time of its exp; the largest p of a row is 1 / sum(exp(t - max(t))).
        p = torch.softmax(t, -1)
        lse[:, rows] = t.amax(-1) - p.amax(-1).log_()
        if dropout_p > 0:
            p *= _keep(seed, rows, keys, starts, (H, B, T, S), p.dtype, dropout_p)
        o.flatten(0, 1)[:, rows] = torch.bmm(p, v[:, keys])
    return o, lse.view(H, B, T).transpose(0, 1).contiguous()


def _fill_grads(
    grads: Sequence[Tensor], do: Tensor, dlse: Tensor | None, o: Tensor, q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens: Tensor | None, seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float,
) -> None:  # fmt: skip
    """Write dq (H, B, T, K), dk and dv (G, B, S, K) into `grads`, which hold zeros; other shapes as in _attend."""
    (H, B, T, _), (G, _, S, _) = q.shape, k.shape
    starts, delta = _starts(cu_seqlens), torch.linalg.vecdot(do, o)
    if dlse is not None:
        delta = delta - dlse.transpose(0, 1)
    q, k, v, do, delta = (
        _flat(q, H),
        _flat(k, H),
        _flat(v, H),
        _flat(do, H),
        delta.view(H * B, T, 1),
    )
    dq = grads[0].flatten(0, 1)
    dk, dv = (grad.flatten(0, 1) if G == H else torch.zeros_like(k) for grad in grads[1:])
    for rows, keys, mask in _blocks(T, S, window, starts, q):
        t = _scores(q[:, rows], k[:, keys], mask, scale, softcap)
        # d tanh: 1 - (t / c)^2, taken where t is finite.
        slope = 1 - (t / softcap).nan_to_num_(neginf=1.0).square_() if softcap > 0 else None
        p = torch.softmax(t, -1)  # exp(t - lse), in half the time
        dp = torch.bmm(do[:, rows], v[:, keys].mT)
        z = (
            _keep(seed, rows, keys, starts, (H, B, T, S), p.dtype, dropout_p)
            if dropout_p > 0
            else None
        )
        dv[:, keys].baddbmm_((p if z is None else p * z).mT, do[:, rows])
        ds = (dp if z is None else dp.mul_(z)).sub_(delta[:, rows]).mul_(p)
        if slope is not None:
            ds *= slope
        torch.mul(torch.bmm(ds, k[:, keys]), scale, out=dq[:, rows])
        dk[:, keys].baddbmm_(ds.mT, q[:, rows], alpha=scale)
    if G != H:
        for grad, flat in zip(grads[1:], (dk, dv), strict=True):
            grad.copy_(flat.view(G, H // G, *grad.shape[1:]).sum(1))


def _starts(cu_seqlens: Tensor | None) -> Tensor | None:
    """Where the document of each token begins, int64; none for the tokens behind the last document."""
    return (
        None if cu_seqlens is None else cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff())
    )


def _blocks(T: int, S: int, window: int, starts: Tensor | None, like: Tensor):
    """Yield blocks of queries as (rows, the keys any of them sees, additive mask (rows, keys) in the dtype of `like`)."""
    end = T if starts is None else len(starts)
    for start in range(0, end, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, end)
        first, last = max(0, start + S - T - window + 1), stop + S - T
        if starts is not None:
            first = max(first, int(starts[start]))
        # The block's row r has its own key in column r + own.
        own = start + S - T - first
        closed = like.new_full((stop - start, last - first), -math.inf)
        mask = closed.triu(own + 1)
        if window < last - first:
            mask = mask + closed.tril(own - window)
        if starts is not None:
            other = torch.arange(first, last, device=starts.device) < starts[start:stop, None]
            mask = mask.masked_fill(other, -math.inf)
        yield slice(start, stop), slice(first, last), mask


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    if softcap == 0:
        return torch.baddbmm(mask, q, k.mT, alpha=scale)
    return torch.bmm(q, k.mT).mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)


def _keep(
    seed: Tensor, rows: slice, keys: slice, starts: Tensor | None, sizes: tuple[int, int, int, int], dtype: torch.dtype,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """1 / (1 - dropout_p) where a probability is kept, 0 where it is dropped; (H B, rows, keys)."""
    H, B, T, S = sizes
    head = torch.arange(B * H, device=seed.device).view(B, H).t().reshape(-1, 1, 1)
    i, j = (torch.arange(axis.start, axis.stop, device=seed.device) for axis in (rows, keys))
    if starts is not None:
        j = (j - starts[rows, None]).clamp(min=0)
    words_per_row = 4 * cdiv(S, 4)
    kept = (
        random_bits(seed, (head * T + i[:, None]) * words_per_row + j)
        >= int(dropout_p * 2**32) - 2**31
    )
    return kept.to(dtype).div_(1 - dropout_p)
