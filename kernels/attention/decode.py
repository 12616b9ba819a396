"""Attention of new tokens to a cache of keys and values, as in every step of generation.

    position   new token t of sequence b is at p = cache_lengths[b] - T + t
    scores     s_j = scale q k_j^T         for keys j with 0 <= p - j < window
               t_j = c tanh(s_j / c)       soft-capping, if c > 0; otherwise t_j = s_j
    output     o = softmax(t) v            zero for a token that sees no key

Shapes     q, o: (B, T, H, K)   k_cache, v_cache: (B, S, G, K), G divides H   cache_lengths: (B,)
Precision  any float dtype in and out; scores, softmax and sums in float32
Gradient   none: inference only
Cost       memory-bound. A row is one token of one query head. Up to 64 rows of the same key head
           share one read of the keys and values. See cost().
Splits     One new token gives only B G tiles of queries, too few for a GPU. The keys are therefore
           split among programs. Each writes its own o and log-sum-exp in float32; a second kernel
           joins them. No atomics: the order of additions depends only on the shapes, the lengths
           and the number of SMs.
Source     Dao, Haziza, Massa & Sizov 2023, "Flash-Decoding for long-context inference"
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.device import DEFAULT_SM_COUNT, sm_count
from ..core.launch import launch_kernel
from ..core.layout import strides_bth, unit_stride, wide
from ..core.matmul import autocast
from ..core.op import can_read_values, define_op, is_eager, is_transformed, public
from ..core.triton import cdiv, next_power_of_2, tl, triton
from ._inputs import check_head_counts
from ._tiles import LOWEST, _capped_scores, _exp2_scale, _is_visible, _load_rows, _softmax_step
from .options import check_head_size, check_score_options

MAX_SPLITS = 64


# --- reference: the definition; also the CPU implementation and the test oracle


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Return o in q's dtype.

    One sequence at a time, because each has its own number of keys. Later keys are not read.
    """
    lengths = cache_lengths.tolist()
    _check_length_values(lengths, k_cache.shape[1])
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b, length in enumerate(lengths):
        k, v = k_cache[b, :length], v_cache[b, :length]
        o[b] = _attend(q[b], k, v, scale, window, softcap)
    return o


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Return o (T, H, K) of one sequence in at least float32. k and v are (S, G, K)."""
    (T, H, K), (S, G) = q.shape, k.shape[:2]
    # The query heads of a key head and their tokens become its rows, (G, H / G T, K).
    rows = wide(q).view(T, G, H // G, K).permute(1, 2, 0, 3).reshape(G, -1, K)
    k, v = (wide(x).transpose(0, 1) for x in (k, v))
    s = rows @ k.mT * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if T == 1 and window >= S:
        o = s.softmax(-1) @ v if S else torch.zeros_like(rows)  # the token sees all keys
    else:
        position = torch.arange(S - T, S, device=q.device)
        ahead = position[:, None] - torch.arange(S, device=q.device)
        seen = ((ahead >= 0) & (ahead < window)).repeat(H // G, 1)
        p = s.masked_fill(~seen, -math.inf).softmax(-1)
        o = p.masked_fill(~seen.any(-1, keepdim=True), 0.0) @ v
    return o.view(G, H // G, T, K).permute(2, 0, 1, 3).reshape(T, H, K)


def shapes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Allocate the output of `reference`."""
    return q.new_empty(q.shape)


def _check_length_values(lengths: list[int], S: int) -> None:
    if any(not 0 <= length <= S for length in lengths):
        raise ValueError(
            f"attention_decode: cache_lengths must be from 0 to the cache's {S}, got {lengths[:20]}"
        )


# --- kernels: a program owns a tile of rows of one key head, and one split of their keys


@triton.jit(do_not_specialize=["B", "S", "splits", "window"])
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    B, T, S, H, group, splits, scale, window, softcap,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store o and lse of one split of the keys. lse is in base 2: the log2 of a sum of exp2."""
    # Find this program's rows. Sequences and tiles share the first axis of the grid, because CUDA
    # limits the other axes to 65,535.
    pid, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(T * group, BLOCK_M)
    batch, pid_m = pid // tiles, pid % tiles
    # Row r is token r / group, head r % group: the heads of a group read the same keys.
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, heads = rows // group, kv_head * group + rows % group
    offs_k = tl.arange(0, BLOCK_K)
    mask = (tokens < T)[:, None] & (offs_k < HEAD)[None, :]
    base = (
        batch.to(tl.int64) * stride_qb
        + tokens.to(tl.int64) * stride_qt
        + heads.to(tl.int64) * stride_qh
    )
    q = tl.load(q_ptr + base[:, None] + offs_k[None, :], mask=mask, other=0.0)

    # The keys [lo, hi) that any of the rows sees, and this program's split of them.
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), S).to(tl.int32)
    shift = length - T
    first = pid_m * BLOCK_M // group
    last = tl.minimum((pid_m * BLOCK_M + BLOCK_M - 1) // group, T - 1)
    hi = last + shift + 1
    lo = 0 if window is None else tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
    keys_per_split = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N), splits) * BLOCK_N
    lo += split * keys_per_split
    hi = tl.minimum(lo + keys_per_split, hi)

    # Loop over the keys with an online softmax, see _kernels.py.
    c = _exp2_scale(scale, softcap)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    total, m = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    for begin in tl.range(lo, hi, BLOCK_N):
        keys = _load_rows(
            k_ptr,
            batch,
            begin,
            hi,
            kv_head,
            stride_kb,
            stride_kt,
            stride_kh,
            HEAD,
            BLOCK_N,
            BLOCK_K,
        )
        s = _capped_scores(tl.dot(q, keys.T, input_precision="ieee"), scale, softcap)
        offs_n = begin + tl.arange(0, BLOCK_N)
        # Keys from `hi` on need no mask. Either a tile of keys ends at `hi`, because the next split
        # begins there, or no token of this program sees a later key.
        seen = _is_visible(tokens[:, None], offs_n[None, :], shift, window)
        s = tl.where(seen, s, -float("inf"))
        p, shrink, m = _softmax_step(s, m, c, True)
        total = total * shrink + tl.sum(p, 1)
        values = _load_rows(
            v_ptr,
            batch,
            begin,
            hi,
            kv_head,
            stride_vb,
            stride_vt,
            stride_vh,
            HEAD,
            BLOCK_N,
            BLOCK_K,
        )
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")

    # Normalize and store. `total` is 0 for a row that sees no key of this split.
    out = ((split * B + batch).to(tl.int64) * T + tokens) * H + heads
    tl.store(lse_ptr + out, m + tl.log2(total), mask=tokens < T)
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(o_ptr + out[:, None] * HEAD + offs_k[None, :], o.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attention_decode_join_kernel(
    o_partial_ptr, lse_ptr, o_ptr,
    rows, splits,
    HEAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Average the splits of one row, each weighted by its sum of exponentials. lse is in base 2."""
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_k = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    offs = offs_s.to(tl.int64) * rows + row
    lse = tl.load(lse_ptr + offs, mask=offs_s < splits, other=-float("inf"))
    # If no split has seen a key, all lse are -inf, and subtracting their maximum would give NaN.
    weight = tl.exp2(lse - tl.maximum(tl.max(lse, 0), LOWEST))
    mask = (offs_s < splits)[:, None] & (offs_k < HEAD)[None, :]
    partial = tl.load(o_partial_ptr + offs[:, None] * HEAD + offs_k[None, :], mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    o = tl.sum(partial * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(o_ptr + row * HEAD + offs_k, o.to(o_ptr.dtype.element_ty), mask=offs_k < HEAD)


# --- launchers: allocate, plan, launch by keyword


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Launch sizes: rows and keys of a tile, padded head size, splits of the keys."""

    block_m: int
    block_n: int
    block_k: int
    splits: int


def plan(
    B: int, T: int, S: int, H: int, G: int, K: int, itemsize: int, sms: int = DEFAULT_SM_COUNT
) -> Plan:
    """Choose tiles, and splits that give every SM two programs if the cache is long enough."""
    rows, block_k = T * H // G, max(16, next_power_of_2(K))
    block_m = min(64, max(16, next_power_of_2(rows)))
    # A tile of keys takes at most 16 KB, and so does a tile of values.
    block_n = max(16, min(128, 16_384 // (block_k * itemsize)))
    programs = B * G * cdiv(rows, block_m)
    splits = max(1, min(MAX_SPLITS, 2 * sms // max(1, programs), cdiv(S, block_n)))
    return Plan(block_m=block_m, block_n=block_n, block_k=block_k, splits=splits)


def launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Kernel counterpart of `reference`."""
    (B, T, H, K), (S, G) = q.shape, k_cache.shape[1:3]
    if can_read_values(cache_lengths):
        _check_length_values(cache_lengths.tolist(), S)
    p = plan(B, T, S, H, G, K, q.element_size(), sm_count(q.device))
    o = shapes(q, k_cache, v_cache, cache_lengths, scale, window, softcap)
    partial = o
    if p.splits > 1:
        partial = torch.empty((p.splits, *o.shape), dtype=torch.float32, device=q.device)
    # In base 2.
    lse = torch.empty((p.splits, B, T, H), dtype=torch.float32, device=q.device)
    launch_kernel(_attention_decode_kernel, (cdiv(T * H // G, p.block_m) * B, G, p.splits),
        q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, lengths_ptr=cache_lengths,
        o_ptr=partial, lse_ptr=lse, **strides_bth(q=q, k=k_cache, v=v_cache),
        B=B, T=T, S=S, H=H, group=H // G, splits=p.splits, scale=scale,
        window=window if window < S else None, softcap=softcap if softcap > 0 else None,
        HEAD=K, BLOCK_M=p.block_m, BLOCK_N=p.block_n, BLOCK_K=p.block_k,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if p.splits > 1:
        launch_kernel(_attention_decode_join_kernel, (B * T * H,),
            o_partial_ptr=partial, lse_ptr=lse, o_ptr=o, rows=B * T * H, splits=p.splits,
            HEAD=K, BLOCK_S=next_power_of_2(p.splits), BLOCK_K=p.block_k,
        )  # fmt: skip
    return o


def cost(B: int, T: int, S: int, H: int, G: int, K: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move, and approximate FLOPs, for T new tokens at the end of S."""
    return {
        "fwd_bytes": 2 * B * (S * G + T * H) * K * itemsize,
        "fwd_flops": 2 * 2 * B * T * S * H * K,
    }


# --- operator


def _needs_no_operator(q: Tensor, *_) -> bool:
    """There are no gradients, so eager code may call the reference directly.

    Inside torch.func.vmap lengths cannot be read. There the operator runs once per example.
    """
    return is_eager(q) and not is_transformed()


_decode = define_op(
    "attention_decode",
    launch=launch,
    reference=reference,
    shapes=shapes,
    composite=reference,
    composite_if=_needs_no_operator,
)


@public
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = 0.0,
) -> Tensor:
    """Attend from each sequence's newest tokens to its cached keys and values, their own included.

    Args:
        q: (B, T, H, K), float32, bfloat16 or float16, on a CPU also float64. K <= 256. Any strides:
            copied if the last one is not 1. T is 1 for a generated token, more for a prompt.
        k_cache, v_cache: (B, S, G, K), dtype and device of q. G divides H. Keys and values after a
            sequence's length are not used.
        cache_lengths: (B,) int32 or int64 on the device of q: how many of the S keys each sequence
            has, the T new ones included. New token t is at cache_lengths[b] - T + t. A length
            outside [0, S] is an error on a CPU. On a GPU, where a check would wait for the device,
            it is clamped.
        scale: multiplies the scores before the softmax, positive. Default: 1 / sqrt(K).
        window: how many keys a token sees, itself included. Default: all.
        softcap: c > 0 replaces a score s by c tanh(s / c). 0 or None: scores stay as they are.
    Returns: o (B, T, H, K), dtype of q; zero for a token that sees no key. It does not require a
        gradient, even if an input does.
    Raises: ValueError for a shape, dtype, device or option that does not fit. TypeError for float64
        on a GPU.
    """
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    _check(q, k_cache, v_cache, cache_lengths)
    check_score_options("attention_decode", scale=scale, window=window, softcap=softcap)
    q, k_cache, v_cache = unit_stride(q), unit_stride(k_cache), unit_stride(v_cache)
    S = k_cache.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    window = S if window is None else min(window, S)
    softcap = float(softcap or 0.0)
    # For inference only. q may come from a model whose parameters require gradients.
    with torch.no_grad():
        return _decode(q, k_cache, v_cache, cache_lengths.contiguous(), scale, window, softcap)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor) -> None:
    name = "attention_decode"
    if q.ndim != 4 or k_cache.ndim != 4 or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{name}: q must be (B, T, H, K), k_cache and v_cache (B, S, G, K), "
            f"got {tuple(q.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    B, _, _, K = q.shape
    if k_cache.shape[0] != B or k_cache.shape[3] != K:
        raise ValueError(
            f"{name}: the caches must have q's batch size {B} and head size {K}, "
            f"got {tuple(k_cache.shape)}"
        )
    check_head_size(name, K)
    check_head_counts(name, q, k_cache)
    if not (q.dtype == k_cache.dtype == v_cache.dtype and q.is_floating_point()):
        raise ValueError(
            f"{name}: q and the caches must have the same float dtype, "
            f"got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}; cast them"
        )
    if cache_lengths.shape != (B,) or cache_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: cache_lengths must be int32 or int64 ({B},), "
            f"got {cache_lengths.dtype} {tuple(cache_lengths.shape)}"
        )
    if not q.device == k_cache.device == v_cache.device == cache_lengths.device:
        raise ValueError(
            f"{name}: q, the caches and cache_lengths must be on the same device, got {q.device}, "
            f"{k_cache.device}, {v_cache.device} and {cache_lengths.device}; move them"
        )
