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
    B, T, H, K = q.shape
    wide_q, wide_k, wide_v = _heads(q, H) * scale, _heads(k, H), _heads(v, H)
    o = torch.empty(B, T, H, K, dtype=q.dtype, device=q.device)
    lse = torch.empty(B * H, T, dtype=wide_q.dtype, device=q.device)
    for rows, keys, mask in _blocks(T, k.shape[1], window, q.device, wide_q.dtype):
        t = _scores(wide_q[:, rows], wide_k[:, keys], mask, softcap)
        # PyTorch's softmax takes half the time of its exp; the largest p of a row is 1 / sum(exp(t - max(t))).
        p = torch.softmax(t, -1)
        lse[:, rows] = t.amax(-1) - p.amax(-1).log()
        if dropout_p > 0:
            p *= _keep(seed, rows, keys, p, T, k.shape[1], dropout_p)
        o[:, rows] = torch.bmm(p, wide_v[:, keys]).unflatten(0, (B, H)).transpose(1, 2)
    return o, lse.view(B, H, T)


def reference_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    wide_q, wide_k, wide_v, wide_do = _heads(q, H) * scale, _heads(k, H), _heads(v, H), _heads(do, H)
    delta = torch.linalg.vecdot(wide_do, _heads(o, H))
    if dlse is not None:
        delta = delta - dlse.reshape(B * H, T)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for rows, keys, mask in _blocks(T, S, window, q.device, wide_q.dtype):
        t = _scores(wide_q[:, rows], wide_k[:, keys], mask, softcap)
        # d tanh: 1 - (t / c)^2, taken where t is finite.
        slope = 1 - (t / softcap).nan_to_num_(neginf=1.0).square_() if softcap > 0 else None
        p = torch.softmax(t, -1)  # exp(t - lse), in half the time
        dp = torch.bmm(wide_do[:, rows], wide_v[:, keys].mT)
        if dropout_p > 0:
            z = _keep(seed, rows, keys, p, T, S, dropout_p)
            dp *= z
            dv[:, keys] += torch.bmm((p * z).mT, wide_do[:, rows])
        else:
            dv[:, keys] += torch.bmm(p.mT, wide_do[:, rows])
        ds = dp.sub_(delta[:, rows, None]).mul_(p)
        if slope is not None:
            ds *= slope
        dq[:, rows] = torch.bmm(ds, wide_k[:, keys]).mul_(scale).unflatten(0, (B, H)).transpose(1, 2)
        dk[:, keys] += torch.bmm(ds.mT, wide_q[:, rows])
    if G != H:
        dk, dv = (grad.view(B, G, H // G, S, K).sum(2) for grad in (dk, dv))
    return dq, *(grad.view(B, G, S, K).transpose(1, 2).to(k.dtype).contiguous() for grad in (dk, dv))


def _heads(x: Tensor, H: int) -> Tensor:
    """(B, T, G, K) as (B H, T, K), each group repeated for its H / G heads, in at least float32."""
    B, T, G, K = x.shape
    x = wide(x).transpose(1, 2)
    return x[:, :, None].expand(B, G, H // G, T, K).reshape(B * H, T, K).contiguous()


def _blocks(T: int, S: int, window: int, device: torch.device, dtype: torch.dtype):
    """Yield blocks of queries as (rows, the keys any of them sees, additive mask of the last of these keys)."""
    for start in range(0, T, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, T)
        first, last = max(0, start + S - T - window + 1), stop + S - T
        # Without a window at work, keys before the block's first query are seen by all of it.
        masked_from = first if window < last else start + S - T
        # Column c of the mask is key masked_from + c, row r query start + r: its own key is in column r + own.
        own = start + S - T - masked_from
        closed = torch.full((stop - start, last - masked_from), -math.inf, dtype=dtype, device=device)
        mask = closed.triu(own + 1)
        yield slice(start, stop), slice(first, last), mask + closed.tril(own - window) if window < last else mask


def _scores(q: Tensor, k: Tensor, mask: Tensor, softcap: float) -> Tensor:
    t = torch.bmm(q, k.mT)
    if softcap > 0:
        t.div_(softcap).tanh_().mul_(softcap)
    # Most of the keys before a block's own are seen by all its queries: only the columns with a mask are touched.
    t[:, :, -mask.shape[1] :] += mask
    return t


def _keep(seed: Tensor, rows: slice, keys: slice, p: Tensor, T: int, S: int, dropout_p: float) -> Tensor:
    """1 / (1 - dropout_p) where a probability is kept, 0 where it is dropped; shape and dtype of p."""
    head = torch.arange(p.shape[0], device=p.device)[:, None, None]
    i, j = torch.arange(rows.start, rows.stop, device=p.device)[:, None], torch.arange(keys.start, keys.stop, device=p.device)
    kept = random_bits(seed, (head * T + i) * S + j) >= int(dropout_p * 2**32)
    return kept.to(p.dtype).div_(1 - dropout_p)


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


def _save(ctx, inputs, output):
    q, k, v, seed, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, seed)


def _grad(ctx, do, dlse):
    if do is None and dlse is None:
        return (None,) * 8
    do = torch.zeros_like(ctx.saved_tensors[0]) if do is None else do
    return *_bwd(do, dlse, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_fwd.register_autograd(_grad, setup_context=_save)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float, dropout_p: float) -> None:
    def fail(expected: str, got: object) -> None:
        raise ValueError(f"causal_attention: {expected}, got {got}")

    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        fail("q must be (B, T, H, K), k and v (B, S, G, K)", f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != K:
        fail(f"k and v must have q's batch {B} and head size {K}", tuple(k.shape))
    if G == 0 or H % G:
        fail(f"the key heads must divide the {H} query heads", G)
    if S < T:
        fail(f"there must be at least as many keys as the {T} queries (they are aligned at the end)", S)
    if not 1 <= K <= MAX_HEAD_SIZE:
        fail(f"the head size must be from 1 to {MAX_HEAD_SIZE}", K)
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        fail("q, k and v must share one float dtype; cast them", f"{q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        fail("q, k and v must be on one device; move them", f"{q.device}, {k.device} and {v.device}")
    if window is not None and window < 1:
        fail("window must be None or at least 1 key (a query sees itself)", window)
    if not 0 <= softcap < math.inf:
        fail("softcap must be 0 (none) or positive and finite", softcap)
    if not 0 <= dropout_p < 1:
        fail("dropout_p must lie in [0, 1)", dropout_p)


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
    _check(q, k, v, window, softcap, dropout_p)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=q.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=q.device)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    window = k.shape[1] if window is None else min(window, k.shape[1])
    o, lse = _fwd(q, k, v, seed, float(scale), window, float(softcap), float(dropout_p))
    return (o, lse) if return_lse else o
