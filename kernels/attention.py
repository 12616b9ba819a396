"""Causal attention with online normalization: grouped heads, sliding window, soft-capping, dropout, log-sum-exp.

    forward    s = scale q k^T    t = c tanh(s / c) (softcap c > 0, else s)    masked: t = -inf
               lse = log sum_j exp(t)    p = exp(t - lse)    o = (p * z) v, where z = keep / (1 - dropout_p) (else 1)
    backward   D = sum(do * o) - dlse    dp = (do v^T) * z    dt = p (dp - D)    ds = dt (1 - (t / c)^2)
               dq = scale ds k    dk = scale ds^T q    dv = (p * z)^T do
    mask       key j is seen by query i if 0 <= i + S - T - j < window

Shapes     q, o: (B, T, H, K)   k, v: (B, S, G, K), G divides H, S >= T   lse: (B, H, T) float32, natural logarithm
Precision  any float dtype in and out; scores, softmax and sums in float32
Dropout    Philox counter ((b H + h) T + i) S + j under the seed: the same mask in forward, backward and recomputation
Cost       products: forward 2, backward 5, each 2 B H K FLOPs a visible (query, key) pair; see cost()
Kernels    none yet: every device runs the reference, which holds one block of queries' scores at a time
Source     Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ._layout import wide
from ._op import autocast, define_op
from ._philox import random_bits

MAX_HEAD_SIZE = 256
# Scores of this many queries at a time: the causal half is skipped, and a block's scores stay near the cache.
BLOCK_QUERIES = 128


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Return o in q's dtype and lse (B, H, T)."""
    o, lse = _attend(_by_head(q), _by_head(k), _by_head(v), seed, scale, window, softcap, dropout_p)
    return _by_token(o, q.dtype), lse


def reference_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv."""
    do, o, *heads = (_by_head(x) for x in (do, o, q, k, v))
    grads = tuple(torch.empty_like(x) for x in heads)
    _fill_grads(grads, do, dlse, o, *heads, seed, scale, window, softcap, dropout_p)
    return tuple(_by_token(grad, q.dtype) for grad in grads)


def reference_qkvpacked_fwd(
    qkv: Tensor, n_head: int, n_kv_head: int, seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H K) and lse of q, k and v lying side by side in the last axis of qkv."""
    counts = n_head, n_kv_head, n_kv_head
    heads = _by_head(qkv.unflatten(-1, (sum(counts), -1)))
    o, lse = _attend(*heads.split(counts), seed, scale, window, softcap, dropout_p)
    return _by_token(o, qkv.dtype).flatten(2), lse


def reference_qkvpacked_bwd(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, seed: Tensor | None, n_head: int, n_kv_head: int,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Return dqkv, laid out as qkv."""
    counts = n_head, n_kv_head, n_kv_head
    heads = _by_head(qkv.unflatten(-1, (sum(counts), -1)))
    do, o = (_by_head(x.unflatten(-1, (n_head, -1))) for x in (do, o))
    dheads = torch.empty_like(heads)
    _fill_grads(dheads.split(counts), do, None, o, *heads.split(counts), seed, scale, window, softcap, dropout_p)
    return _by_token(dheads, qkv.dtype).flatten(2)


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
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """o (H, B, T, K) and lse (B, H, T) of q (H, B, T, K), k and v (G, B, S, K)."""
    (H, B, T, _), S = q.shape, k.shape[2]
    o, lse = torch.empty_like(q), q.new_empty(H * B, T)
    q, k, v = _flat(q, H), _flat(k, H), _flat(v, H)
    for rows, keys, mask in _blocks(T, S, window, q):
        t = _scores(q[:, rows], k[:, keys], mask, scale, softcap)
        # PyTorch's softmax takes half the time of its exp; the largest p of a row is 1 / sum(exp(t - max(t))).
        p = torch.softmax(t, -1)
        lse[:, rows] = t.amax(-1) - p.amax(-1).log_()
        if dropout_p > 0:
            p *= _keep(seed, rows, keys, (H, B, T, S), p.dtype, dropout_p)
        o.flatten(0, 1)[:, rows] = torch.bmm(p, v[:, keys])
    return o, lse.view(H, B, T).transpose(0, 1).contiguous()


def _fill_grads(
    grads: Sequence[Tensor], do: Tensor, dlse: Tensor | None, o: Tensor, q: Tensor, k: Tensor, v: Tensor,
    seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float,
) -> None:  # fmt: skip
    """Write dq (H, B, T, K), dk and dv (G, B, S, K) into `grads`; other shapes as in _attend."""
    (H, B, T, _), (G, _, S, _) = q.shape, k.shape
    delta = torch.linalg.vecdot(do, o)
    if dlse is not None:
        delta = delta - dlse.transpose(0, 1)
    q, k, v, do, delta = _flat(q, H), _flat(k, H), _flat(v, H), _flat(do, H), delta.view(H * B, T, 1)
    dq = grads[0].flatten(0, 1)
    dk, dv = (grad.zero_().flatten(0, 1) if G == H else torch.zeros_like(k) for grad in grads[1:])
    for rows, keys, mask in _blocks(T, S, window, q):
        t = _scores(q[:, rows], k[:, keys], mask, scale, softcap)
        # d tanh: 1 - (t / c)^2, taken where t is finite.
        slope = 1 - (t / softcap).nan_to_num_(neginf=1.0).square_() if softcap > 0 else None
        p = torch.softmax(t, -1)  # exp(t - lse), in half the time
        dp = torch.bmm(do[:, rows], v[:, keys].mT)
        z = _keep(seed, rows, keys, (H, B, T, S), p.dtype, dropout_p) if dropout_p > 0 else None
        dv[:, keys].baddbmm_((p if z is None else p * z).mT, do[:, rows])
        ds = (dp if z is None else dp.mul_(z)).sub_(delta[:, rows]).mul_(p)
        if slope is not None:
            ds *= slope
        torch.mul(torch.bmm(ds, k[:, keys]), scale, out=dq[:, rows])
        dk[:, keys].baddbmm_(ds.mT, q[:, rows], alpha=scale)
    if G != H:
        for grad, flat in zip(grads[1:], (dk, dv), strict=True):
            grad.copy_(flat.view(G, H // G, *grad.shape[1:]).sum(1))


def _blocks(T: int, S: int, window: int, like: Tensor):
    """Yield blocks of queries as (rows, the keys any of them sees, additive mask (rows, keys) in the dtype of `like`)."""
    for start in range(0, T, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, T)
        first, last = max(0, start + S - T - window + 1), stop + S - T
        # The block's row r has its own key in column r + own.
        own = start + S - T - first
        closed = like.new_full((stop - start, last - first), -math.inf)
        mask = closed.triu(own + 1)
        yield slice(start, stop), slice(first, last), mask + closed.tril(own - window) if window < last - first else mask


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    if softcap == 0:
        return torch.baddbmm(mask, q, k.mT, alpha=scale)
    return torch.bmm(q, k.mT).mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)


def _keep(
    seed: Tensor, rows: slice, keys: slice, sizes: tuple[int, int, int, int], dtype: torch.dtype, dropout_p: float
) -> Tensor:
    """1 / (1 - dropout_p) where a probability is kept, 0 where it is dropped; (H B, rows, keys)."""
    H, B, T, S = sizes
    head = torch.arange(B * H, device=seed.device).view(B, H).t().reshape(-1, 1, 1)
    i, j = (torch.arange(axis.start, axis.stop, device=seed.device) for axis in (rows, keys))
    kept = random_bits(seed, (head * T + i[:, None]) * S + j) >= int(dropout_p * 2**32)
    return kept.to(dtype).div_(1 - dropout_p)


def cost(B: int, T: int, S: int, H: int, G: int, K: int, itemsize: int, *, window: int | None = None) -> dict[str, int]:
    """FLOPs of the products over visible pairs, and least bytes to move, forward and backward."""
    window = S if window is None else window
    pairs = sum(min(window, i + S - T + 1) for i in range(T))
    q_bytes, kv_bytes, lse_bytes = B * T * H * K * itemsize, 2 * B * S * G * K * itemsize, 4 * B * H * T
    return {
        "fwd_flops": 2 * 2 * B * H * K * pairs,
        "bwd_flops": 5 * 2 * B * H * K * pairs,
        "fwd_bytes": 2 * q_bytes + kv_bytes + lse_bytes,
        "bwd_bytes": 4 * q_bytes + 2 * kv_bytes + lse_bytes,
    }


# --- operator

_fwd = define_op("causal_attention_fwd", launch=None, reference=reference_fwd)
_bwd = define_op("causal_attention_bwd", launch=None, reference=reference_bwd)
_packed_fwd = define_op("causal_attention_qkvpacked_fwd", launch=None, reference=reference_qkvpacked_fwd)
_packed_bwd = define_op("causal_attention_qkvpacked_bwd", launch=None, reference=reference_qkvpacked_bwd)


def _save(ctx, inputs, output):
    q, k, v, seed, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, seed)


def _grad(ctx, do, dlse):
    if do is None and dlse is None:
        return (None,) * 8
    do = torch.zeros_like(ctx.saved_tensors[0]) if do is None else do
    return *_bwd(do, dlse, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


def _packed_save(ctx, inputs, output):
    qkv, *heads, seed, scale, window, softcap, dropout_p = inputs
    ctx.options = (*heads, scale, window, softcap, dropout_p)
    # lse is kept for the backward alone: its gradient is never asked for.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, seed)


def _packed_grad(ctx, do, _dlse):
    dqkv = None if do is None else _packed_bwd(do.contiguous(), *ctx.saved_tensors, *ctx.options)
    return dqkv, *[None] * 7


_fwd.register_autograd(_grad, setup_context=_save)
_packed_fwd.register_autograd(_packed_grad, setup_context=_packed_save)


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{name}: {expected}, got {got}")


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fail = partial(_fail, "causal_attention")
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        fail("q must be (B, T, H, K), k and v (B, S, G, K)", f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != K:
        fail(f"k and v must have q's batch {B} and head size {K}", tuple(k.shape))
    if G == 0 or H % G:
        fail(f"the key heads must divide the {H} query heads", G)
    if S < T:
        fail(f"there must be at least as many keys as the {T} queries (they are aligned at the end)", S)
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        fail("q, k and v must share one float dtype; cast them", f"{q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        fail("q, k and v must be on one device; move them", f"{q.device}, {k.device} and {v.device}")


def _settled(
    name: str, head_size: int, keys: int, device: torch.device,
    scale: float | None, window: int | None, softcap: float, dropout_p: float, seed: int | Tensor | None,
) -> tuple[Tensor | None, float, int, float, float]:  # fmt: skip
    """Check the options and fill in their defaults: seed, scale, window, softcap, dropout_p as the operators take them."""
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        _fail(name, f"the head size must be from 1 to {MAX_HEAD_SIZE}", head_size)
    if window is not None and window < 1:
        _fail(name, "window must be None or at least 1 key (a query sees itself)", window)
    if not 0 <= softcap < math.inf:
        _fail(name, "softcap must be 0 (none) or positive and finite", softcap)
    if not 0 <= dropout_p < 1:
        _fail(name, "dropout_p must lie in [0, 1)", dropout_p)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=device)
    scale = 1 / math.sqrt(head_size) if scale is None else scale
    return seed, float(scale), keys if window is None else min(window, keys), float(softcap), float(dropout_p)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None, softcap: float = 0.0,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from each query to itself and the keys before it.

    Args:
        q: (B, T, H, K), float32, bfloat16 or float16, K <= 256; any strides.
        k, v: (B, S, G, K), dtype and device of q; G divides H, S >= T: the last query sees the last key.
        scale: factor of the scores before the softmax; default 1 / sqrt(K).
        window: how many keys a query sees, itself included; None for all.
        softcap: c > 0 turns a score s into c tanh(s / c).
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: of the dropout mask, int or () int64 tensor on q's device; default: drawn from PyTorch's generator of q's device.
        return_lse: also return the log-sum-exp of the scores; gradients flow through it.
    Returns: o (B, T, H, K) in the dtype of q, or (o, lse): lse (B, H, T), natural logarithm, float32 (of float64 q float64).
    Raises: ValueError for shapes, dtypes, devices and options that do not fit, naming what was expected.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v)
    options = _settled("causal_attention", q.shape[-1], k.shape[1], q.device, scale, window, softcap, dropout_p, seed)
    o, lse = _fwd(q, k, v, *options)
    return (o, lse) if return_lse else o


def causal_attention_qkvpacked(
    qkv: Tensor, n_head: int, *, n_kv_head: int | None = None, scale: float | None = None, window: int | None = None,
    softcap: float = 0.0, dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend as causal_attention does, reading q, k and v where a linear layer wrote them.

    Args:
        qkv: (B, T, (H + 2 G) K), float32, bfloat16 or float16: H query heads, then G key heads, then G value heads.
        n_head: H.
        n_kv_head: G, a divisor of H; default H.
        scale, window, softcap, dropout_p, seed: as for causal_attention.
    Returns: o (B, T, H K) in the dtype of qkv. The gradient of qkv comes back packed too.
    Raises: ValueError for shapes, dtypes and options that do not fit, naming what was expected.
    """
    name, G = "causal_attention_qkvpacked", n_head if n_kv_head is None else n_kv_head
    (qkv,) = autocast(qkv)
    if n_head < 1 or G < 1 or n_head % G:
        _fail(name, "n_kv_head must divide n_head, both at least 1", f"{n_kv_head} and {n_head}")
    if qkv.ndim != 3 or qkv.shape[-1] == 0 or qkv.shape[-1] % (n_head + 2 * G) or not qkv.is_floating_point():
        expected = f"qkv must be floating point (B, T, {n_head + 2 * G} K) for {n_head} query and {G} key heads"
        _fail(name, expected, f"{qkv.dtype} {tuple(qkv.shape)}")
    head_size = qkv.shape[-1] // (n_head + 2 * G)
    options = _settled(name, head_size, qkv.shape[1], qkv.device, scale, window, softcap, dropout_p, seed)
    o, _ = _packed_fwd(qkv, n_head, G, *options)
    return o
