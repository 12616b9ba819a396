"""The definition of causal attention in PyTorch: the formulas of causal.py, by blocks of queries.

The CPU runs these functions and the tests compare the kernels with them. Each `reference_*` has a
`shapes_*` that allocates the same outputs without computing them. torch.compile calls `shapes_*` on
fake tensors. With `reference_*` it would unroll the Python loop over blocks, and compile again for
every sequence length.

Heads are the first axis here, so that one batched matmul covers all heads and sequences:
(H, B, T, K), flattened to (H B, T, K).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.dropout import threshold_of
from ..core.layout import wide
from ..core.philox import random_bits
from ..core.triton import cdiv
from ._inputs import check_document_values
from .options import AttentionOptions

# Queries of one block. Keys after the block's last query are skipped. This halves the work, and the
# scores of a block take little memory.
BLOCK_QUERIES = 128


def reference_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Return o in q's dtype and lse (B, H, T).

    With documents the batch size is 1. Tokens after the last document get zeros.
    """
    check_document_values("causal_attention_varlen", options.cu_seqlens, q.shape[1])
    return attend(q, k, v, options)


def attend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Return the same as `reference_fwd`, for checked cu_seqlens."""
    o, lse = _attend(_by_head(q), _by_head(k), _by_head(v), options)
    return _by_token(o, q.dtype), lse


def shapes_fwd(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of `reference_fwd`."""
    B, T, H, _ = q.shape
    lse = q.new_empty((B, H, T), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def reference_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    grads = wide_grads(do, dlse, q, k, v, o, options)
    return tuple(grad.to(q.dtype).contiguous() for grad in grads)


def wide_grads(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in at least float32, as views of tensors whose first axis is the heads."""
    do, o, *heads = (_by_head(x) for x in (do, o, q, k, v))
    grads = tuple(torch.zeros_like(x) for x in heads)
    _fill_grads(grads, do, dlse, o, *heads, options)
    return tuple(grad.permute(1, 2, 0, 3) for grad in grads)


def shapes_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the outputs of `reference_bwd`."""
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def reference_qkvpacked_fwd(
    qkv: Tensor,
    added_bias: Tensor | None,
    n_head: int,
    n_kv_head: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H K) and lse (B, H, T). q, k and v lie next to each other in qkv.

    The value of `added_bias` is not read: qkv contains it.
    """
    check_document_values("causal_attention_qkvpacked", options.cu_seqlens, qkv.shape[1])
    o, lse = attend(*split_qkv(qkv, n_head, n_kv_head), options)
    return o.flatten(2), lse


def shapes_qkvpacked_fwd(
    qkv: Tensor,
    added_bias: Tensor | None,
    n_head: int,
    n_kv_head: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of `reference_qkvpacked_fwd`."""
    B, T, width = qkv.shape
    head_size = width // (n_head + 2 * n_kv_head)
    lse = qkv.new_empty((B, n_head, T), dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty((B, T, head_size * n_head)), lse


def reference_qkvpacked_bwd(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    n_head: int,
    n_kv_head: int,
    needs_bias: bool,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Return dqkv, in the layout of qkv, and the gradient of its bias ((H + 2 G) K,).

    The latter is the sum of dqkv over tokens, before dqkv is rounded. Empty if not needed.
    """
    counts = n_head, n_kv_head, n_kv_head
    heads = _by_head(qkv.unflatten(-1, (sum(counts), -1)))
    do, o = (_by_head(x.unflatten(-1, (n_head, -1))) for x in (do, o))
    dheads = torch.zeros_like(heads)
    _fill_grads(dheads.split(counts), do, None, o, *heads.split(counts), options)
    dbias = dheads.sum((1, 2)).flatten() if needs_bias else dheads.new_empty(0)
    return _by_token(dheads, qkv.dtype).flatten(2), dbias


def shapes_qkvpacked_bwd(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    n_head: int,
    n_kv_head: int,
    needs_bias: bool,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of `reference_qkvpacked_bwd`."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    dbias = qkv.new_empty(qkv.shape[-1] if needs_bias else 0, dtype=dtype)
    return qkv.new_empty(qkv.shape), dbias


# --- layouts


def split_qkv(qkv: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q (B, T, H, K), k and v (B, T, G, K) in qkv (B, T, (H + 2 G) K)."""
    # view and split_with_sizes take half of the host time of unflatten and split (November 2026).
    B, T, width = qkv.shape
    heads = n_head + 2 * n_kv_head
    by_head = qkv.view(B, T, heads, width // heads)
    return by_head.split_with_sizes((n_head, n_kv_head, n_kv_head), dim=2)


def _by_head(x: Tensor) -> Tensor:
    """(B, T, H, K) to (H, B, T, K), at least float32, contiguous."""
    return wide(x).permute(2, 0, 1, 3).contiguous()


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(H, B, T, K) to (B, T, H, K), contiguous."""
    return x.permute(1, 2, 0, 3).to(dtype).contiguous()


def _flat(x: Tensor, H: int) -> Tensor:
    """(G, B, T, K) to (H B, T, K). Each head is repeated for its group of H / G query heads."""
    G = x.shape[0]
    return (x if G == H else x.repeat_interleave(H // G, 0)).flatten(0, 1)


# --- forward and backward over blocks of queries


def _attend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Return o (H, B, T, K) and lse (B, H, T) for q (H, B, T, K), k and v (G, B, S, K)."""
    (H, B, T, _), S = q.shape, k.shape[2]
    o = torch.zeros_like(q)
    lse = q.new_zeros(H * B, T)
    starts = _starts(options.cu_seqlens)
    q, k, v = _flat(q, H), _flat(k, H), _flat(v, H)
    for rows, keys, mask in _blocks(T, S, options.window, starts, q):
        t = _scores(q[:, rows], k[:, keys], mask, options)
        # torch.softmax takes half the time of torch.exp(t - lse) (November 2026). The largest p of
        # a row is 1 / sum(exp(t - max(t))), which gives lse.
        p = torch.softmax(t, -1)
        lse[:, rows] = t.amax(-1) - p.amax(-1).log_()
        if options.dropout_p > 0:
            p *= _dropout_scale(options, rows, keys, starts, (H, B, T, S), p.dtype)
        o.flatten(0, 1)[:, rows] = torch.bmm(p, v[:, keys])
    return o, lse.view(H, B, T).transpose(0, 1).contiguous()


def _fill_grads(
    grads: Sequence[Tensor],
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
) -> None:
    """Write dq (H, B, T, K), dk and dv (G, B, S, K) to `grads`, which are zero on entry.

    Other shapes are as in `_attend`.
    """
    (H, B, T, _), (G, _, S, _) = q.shape, k.shape
    starts = _starts(options.cu_seqlens)

    # delta = sum(do * o) - dlse, one number per query.
    delta = torch.linalg.vecdot(do, o)
    if dlse is not None:
        delta = delta - dlse.transpose(0, 1)
    delta = delta.view(H * B, T, 1)

    # With grouped heads, dk and dv are first computed per query head.
    q, k, v, do = (_flat(x, H) for x in (q, k, v, do))
    dq = grads[0].flatten(0, 1)
    dk, dv = (grad.flatten(0, 1) if G == H else torch.zeros_like(k) for grad in grads[1:])

    for rows, keys, mask in _blocks(T, S, options.window, starts, q):
        # Recompute the weights p.
        t = _scores(q[:, rows], k[:, keys], mask, options)
        slope = None
        if options.softcap > 0:
            # The derivative of c tanh(s / c) is 1 - (t / c)^2. Masked scores (-inf) get slope 0.
            slope = 1 - (t / options.softcap).nan_to_num_(neginf=1.0).square_()
        p = torch.softmax(t, -1)

        # Gradient of the weights, and dv.
        dp = torch.bmm(do[:, rows], v[:, keys].mT)
        if options.dropout_p > 0:
            z = _dropout_scale(options, rows, keys, starts, (H, B, T, S), p.dtype)
            dp.mul_(z)
            dv[:, keys].baddbmm_((p * z).mT, do[:, rows])
        else:
            dv[:, keys].baddbmm_(p.mT, do[:, rows])

        # Gradient of the scores, dq and dk.
        ds = dp.sub_(delta[:, rows]).mul_(p)
        if slope is not None:
            ds *= slope
        torch.mul(torch.bmm(ds, k[:, keys]), options.scale, out=dq[:, rows])
        dk[:, keys].baddbmm_(ds.mT, q[:, rows], alpha=options.scale)

    # Sum dk and dv over the query heads of each group.
    if G != H:
        for grad, per_head in zip(grads[1:], (dk, dv), strict=True):
            grad.copy_(per_head.view(G, H // G, *grad.shape[1:]).sum(1))


def _starts(cu_seqlens: Tensor | None) -> Tensor | None:
    """The first token of each token's document, int64. It ends with the last document."""
    if cu_seqlens is None:
        return None
    return cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff())


def _blocks(
    T: int, S: int, window: int, starts: Tensor | None, like: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of queries: (queries, the keys that any of them sees, mask (queries, keys)).

    The mask is added to the scores: 0 where a query sees a key, -inf elsewhere, dtype of `like`.
    """
    end = T if starts is None else len(starts)
    for start in range(0, end, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, end)
        first = max(0, start + S - T - window + 1)
        last = stop + S - T
        if starts is not None:
            first = max(first, int(starts[start]))
        # Query `start + r` is the same token as key `first + r + own`.
        own = start + S - T - first
        closed = like.new_full((stop - start, last - first), -math.inf)
        mask = closed.triu(own + 1)
        if window < last - first:
            mask = mask + closed.tril(own - window)
        if starts is not None:
            other = torch.arange(first, last, device=starts.device) < starts[start:stop, None]
            mask = mask.masked_fill(other, -math.inf)
        yield slice(start, stop), slice(first, last), mask


def _scores(q: Tensor, k: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Scaled, soft-capped and masked scores."""
    scale, softcap = options.scale, options.softcap
    if softcap == 0:
        return torch.baddbmm(mask, q, k.mT, alpha=scale)
    return torch.bmm(q, k.mT).mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)


def _dropout_scale(
    options: AttentionOptions,
    rows: slice,
    keys: slice,
    starts: Tensor | None,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return z (H B, rows, keys): 1 / (1 - dropout_p) for weights to keep, 0 for the others."""
    H, B, T, S = sizes
    device = options.seed.device
    head = torch.arange(B * H, device=device).view(B, H).t().reshape(-1, 1, 1)  # b H + h
    i, j = (torch.arange(axis.start, axis.stop, device=device) for axis in (rows, keys))
    if starts is not None:
        # Keys are counted from the first token of the document.
        j = (j - starts[rows, None]).clamp(min=0)
    words_per_row = 4 * cdiv(S, 4)
    words = random_bits(options.seed, (head * T + i[:, None]) * words_per_row + j)
    kept = words >= threshold_of(options.dropout_p)
    return kept.to(dtype).div_(1 - options.dropout_p)
