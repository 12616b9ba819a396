"""Causal attention with online normalization: grouped heads, sliding window, soft-capping, dropout, packed documents.

    forward    s = scale q k^T    t = c tanh(s / c) (softcap c > 0, else s)    masked: t = -inf
               lse = log sum_j exp(t)    p = exp(t - lse)    o = (p * z) v, where z = keep / (1 - dropout_p) (else 1)
    backward   D = sum(do * o) - dlse    dp = (do v^T) * z    dt = p (dp - D)    ds = dt (1 - (t / c)^2)
               dq = scale ds k    dk = scale ds^T q    dv = (p * z)^T do
    mask       key j is seen by query i if 0 <= i + S - T - j < window and both are of one document

Shapes     q, o: (B, T, H, K)   k, v: (B, S, G, K), G divides H, S >= T   lse: (B, H, T) float32, natural logarithm
           packed documents: (N, H, K) and (N, G, K), told apart by cu_seqlens (documents + 1,)
Precision  any float dtype in and out; scores, softmax and sums in float32; p and ds are rounded to the inputs' dtype for their
           products
Dropout    word j % 4 of Philox counter ((b H + h) T + i) ceil(S / 4) + j / 4 under the seed, j counted from the document's
           first key: the same mask in forward, backward and recomputation
Cost       products: forward 2, backward 7, each 2 B H K FLOPs a visible (query, key) pair; the least is 2 and 5, see cost()
Determinism  no atomics: one backward kernel owns queries (dq: 3 products), one owns keys (dk, dv: 4), each sums in a fixed
           order. Two of the seven products and the exponentials are done twice for it. A single pass of 5 would have to order
           its additions to dq across programs; published ones lose 18 % and more to that, where this scheme has no waiting at
           all and no float32 copy of dq. lse's gradient and D ride in the kernel that owns queries
CPU        the definition; without options, and a query for each key, PyTorch's fused operator
Files      definition _attention_reference.py, kernels _attention_kernels.py, tiles and launches _attention_launch.py
Source     Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..core.matmul import autocast
from ..core.op import define_op, public, runs_reference
from ._launch import launch_bwd, launch_fwd, launch_qkvpacked_bwd, launch_qkvpacked_fwd
from ._reference import (
    reference_bwd,
    reference_fwd,
    reference_qkvpacked_bwd,
    reference_qkvpacked_fwd,
    shapes_bwd,
    shapes_fwd,
    shapes_qkvpacked_bwd,
    shapes_qkvpacked_fwd,
)

MAX_HEAD_SIZE = 256


def cost(
    B: int, T: int, S: int, H: int, G: int, K: int, itemsize: int, *, window: int | None = None
) -> dict[str, int]:
    """FLOPs of the products over visible pairs, and least bytes to move, forward and backward."""
    window = S if window is None else window
    pairs = sum(min(window, i + S - T + 1) for i in range(T))
    q_bytes, kv_bytes, lse_bytes = (
        B * T * H * K * itemsize,
        2 * B * S * G * K * itemsize,
        4 * B * H * T,
    )
    return {
        "fwd_flops": 2 * 2 * B * H * K * pairs,
        "bwd_flops": 5 * 2 * B * H * K * pairs,
        "fwd_bytes": 2 * q_bytes + kv_bytes + lse_bytes,
        "bwd_bytes": 4 * q_bytes + 2 * kv_bytes + lse_bytes,
    }


# --- operator

_fwd = define_op(
    "causal_attention_fwd", launch=launch_fwd, reference=reference_fwd, shapes=shapes_fwd
)
_bwd = define_op(
    "causal_attention_bwd", launch=launch_bwd, reference=reference_bwd, shapes=shapes_bwd
)
_packed_fwd = define_op(
    "causal_attention_qkvpacked_fwd",
    launch=launch_qkvpacked_fwd,
    reference=reference_qkvpacked_fwd,
    shapes=shapes_qkvpacked_fwd,
)
_packed_bwd = define_op(
    "causal_attention_qkvpacked_bwd",
    launch=launch_qkvpacked_bwd,
    reference=reference_qkvpacked_bwd,
    shapes=shapes_qkvpacked_bwd,
)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, seed, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, seed)


def _grad(ctx, do, dlse):
    if do is None and dlse is None:
        return (None,) * 9
    do = torch.zeros_like(ctx.saved_tensors[0]) if do is None else do
    return *_bwd(
        _unit_stride(do),
        None if dlse is None else dlse.contiguous(),
        *ctx.saved_tensors,
        *ctx.options,
    ), *[None] * 6


def _packed_save(ctx, inputs, output):
    qkv, n_head, n_kv_head, cu_seqlens, seed, *options = inputs
    ctx.options = (n_head, n_kv_head, *options)
    # lse is kept for the backward alone: its gradient is never asked for.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed)


def _packed_grad(ctx, do, _dlse):
    dqkv = None if do is None else _packed_bwd(do.contiguous(), *ctx.saved_tensors, *ctx.options)
    return dqkv, *[None] * 8


_fwd.register_autograd(_grad, setup_context=_save)
_packed_fwd.register_autograd(_packed_grad, setup_context=_packed_save)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{name}: {expected}, got {got}")


def _check(name: str, axes: int, shapes: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """What holds of any q, k and v, the last axes of which are heads and head size."""
    fail = partial(_fail, name)
    if q.ndim != axes or k.ndim != axes or v.shape != k.shape:
        fail(shapes, f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1]:
        fail(f"k and v must have q's head size {q.shape[-1]}", tuple(k.shape))
    if q.shape[-2] == 0:
        fail("q must have at least one head", tuple(q.shape))
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        fail(f"the key heads must divide the {q.shape[-2]} query heads", k.shape[-2])
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        fail(
            "q, k and v must share one float dtype; cast them",
            f"{q.dtype}, {k.dtype} and {v.dtype}",
        )
    if not q.device == k.device == v.device:
        fail(
            "q, k and v must be on one device; move them", f"{q.device}, {k.device} and {v.device}"
        )


def _check_documents(name: str, cu_seqlens: Tensor, device: torch.device) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        _fail(
            name,
            "cu_seqlens must be int32 (documents + 1,)",
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}",
        )
    if cu_seqlens.device != device:
        _fail(name, f"cu_seqlens must be on {device} like q; move it", cu_seqlens.device)


def _settled(
    name: str, head_size: int, keys: int, device: torch.device,
    scale: float | None, window: int | None, softcap: float, dropout_p: float, seed: int | Tensor | None,
) -> tuple[Tensor | None, float, int, float, float]:  # fmt: skip
    """Check the options and fill in their defaults: seed, scale, window, softcap, dropout_p as the operators take them."""
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        _fail(name, f"the head size must be from 1 to {MAX_HEAD_SIZE}", head_size)
    if scale is not None and not 0 < scale < math.inf:
        _fail(name, "scale must be None (1 / sqrt(K)) or positive and finite", scale)
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
    elif seed.shape != () or seed.dtype != torch.int64 or seed.device != device:
        got = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
        _fail(name, f"seed must be an int or a () int64 tensor on {device}", got)
    scale = 1 / math.sqrt(head_size) if scale is None else scale
    return (
        seed,
        float(scale),
        keys if window is None else min(window, keys),
        float(softcap),
        float(dropout_p),
    )


def _is_plain(
    q: Tensor,
    k: Tensor,
    seed: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
) -> bool:
    """Whether a CPU computes what PyTorch has a fused operator for: as many queries as keys, none of the options."""
    T, S = q.shape[1], k.shape[1]
    return runs_reference(q) and T == S <= window and softcap == dropout_p == 0


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )
    return o.transpose(1, 2).contiguous()


@public
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None, softcap: float = 0.0,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from each query to itself and the keys before it.

    Args:
        q: (B, T, H, K), float32, bfloat16 or float16 (float64 on the CPU too), K <= 256; any strides, read in place where the
            last one is 1, copied otherwise.
        k, v: (B, S, G, K), dtype and device of q; G divides H, S >= T: the last query sees the last key.
        scale: positive factor of the scores before the softmax; default 1 / sqrt(K).
        window: how many keys a query sees, itself included; None for all.
        softcap: c > 0 turns a score s into c tanh(s / c).
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: of the dropout mask, int or () int64 tensor on q's device; default: drawn from PyTorch's generator of q's device.
        return_lse: also return the log-sum-exp of the scores; gradients flow through it.
    Returns: o (B, T, H, K) in the dtype of q, or (o, lse): lse (B, H, T), natural logarithm, float32 (of float64 q float64).
    Raises: ValueError for shapes, dtypes, devices and options that do not fit, naming what was expected. TypeError for float64
        on a GPU.
    """
    name = "causal_attention"
    q, k, v = autocast(q, k, v)
    _check(name, 4, "q must be (B, T, H, K), k and v (B, S, G, K)", q, k, v)
    if k.shape[0] != q.shape[0]:
        _fail(name, f"k and v must have q's batch {q.shape[0]}", tuple(k.shape))
    if k.shape[1] < q.shape[1]:
        expected = f"there must be at least as many keys as the {q.shape[1]} queries (they are aligned at the end)"
        _fail(name, expected, k.shape[1])
    options = _settled(
        name, q.shape[-1], k.shape[1], q.device, scale, window, softcap, dropout_p, seed
    )
    q, k, v = map(_unit_stride, (q, k, v))
    if not return_lse and _is_plain(q, k, *options):
        return _plain(q, k, v, options[1])
    o, lse = _fwd(q, k, v, None, *options)
    return (o, lse) if return_lse else o


@public
def causal_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None,
    window: int | None = None, softcap: float = 0.0, dropout_p: float = 0.0, seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend within each of the documents that lie packed end to end.

    Args:
        q: (N, H, K), as for causal_attention. All N rows of q, k, v and o's gradient must be finite, padding too, and so must
            their products: tiles read past the end of a document and hide what is there behind a factor of 0.
        k, v: (N, G, K), dtype and device of q; G divides H.
        cu_seqlens: (documents + 1,) int32 on q's device: where each document begins, 0 first, and where the last one ends, at
            most N. Empty documents may be among them; tokens behind the last are padding, with zeros for o, lse and gradients.
            Checked on the CPU only: elsewhere that would wait for the device.
        max_seqlen: length of the longest document or anything above it. Results do not depend on it.
        scale, window, softcap, dropout_p, seed, return_lse: as for causal_attention.
    Returns: o (N, H, K) in the dtype of q, or (o, lse): lse (H, N) as for causal_attention.
    Raises: ValueError for shapes, dtypes, devices and options that do not fit, naming what was expected. TypeError for float64
        on a GPU.
    """
    name = "causal_attention_varlen"
    q, k, v = autocast(q, k, v)
    _check(name, 3, "q must be (N, H, K), k and v (N, G, K)", q, k, v)
    if k.shape[0] != q.shape[0]:
        _fail(name, f"there must be as many keys as the {q.shape[0]} queries", k.shape[0])
    _check_documents(name, cu_seqlens, q.device)
    if max_seqlen < 1:
        _fail(
            name, "max_seqlen must be at least 1, the longest document's length or more", max_seqlen
        )
    options = _settled(name, q.shape[-1], len(q), q.device, scale, window, softcap, dropout_p, seed)
    o, lse = _fwd(
        *(_unit_stride(x).unsqueeze(0) for x in (q, k, v)), cu_seqlens.contiguous(), *options
    )
    return (o[0], lse[0]) if return_lse else o[0]


@public
def causal_attention_qkvpacked(
    qkv: Tensor, n_head: int, *, n_kv_head: int | None = None, scale: float | None = None, window: int | None = None,
    softcap: float = 0.0, dropout_p: float = 0.0, seed: int | Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend as causal_attention does, reading q, k and v where a linear layer wrote them.

    Args:
        qkv: (B, T, (H + 2 G) K), dtype as for causal_attention: H query heads, then G key heads, then G value heads.
        n_head: H.
        n_kv_head: G, a divisor of H; default H.
        scale, window, softcap, dropout_p, seed: as for causal_attention.
        cu_seqlens: as for causal_attention_varlen, of documents packed in the B T tokens; default: B sequences.
    Returns: o (B, T, H K) in the dtype of qkv. The gradient of qkv comes back packed too.
    Raises: ValueError for shapes, dtypes and options that do not fit, naming what was expected. TypeError for float64 on a GPU.
    """
    name, G = "causal_attention_qkvpacked", n_head if n_kv_head is None else n_kv_head
    (qkv,) = autocast(qkv)
    if n_head < 1 or G < 1 or n_head % G:
        _fail(name, "n_kv_head must divide n_head, both at least 1", f"{n_kv_head} and {n_head}")
    if (
        qkv.ndim != 3
        or qkv.shape[-1] == 0
        or qkv.shape[-1] % (n_head + 2 * G)
        or not qkv.is_floating_point()
    ):
        expected = f"qkv must be floating point (B, T, {n_head + 2 * G} K) for {n_head} query and {G} key heads"
        _fail(name, expected, f"{qkv.dtype} {tuple(qkv.shape)}")
    (B, T, width), keys = qkv.shape, qkv.shape[1]
    if cu_seqlens is not None:
        _check_documents(name, cu_seqlens, qkv.device)
        qkv, cu_seqlens, keys = qkv.reshape(1, B * T, width), cu_seqlens.contiguous(), B * T
    options = _settled(
        name, width // (n_head + 2 * G), keys, qkv.device, scale, window, softcap, dropout_p, seed
    )
    qkv = _unit_stride(qkv)
    if cu_seqlens is None and _is_plain(qkv, qkv, *options):
        return _plain(
            *qkv.unflatten(-1, (n_head + 2 * G, -1)).split((n_head, G, G), dim=2), options[1]
        ).flatten(2)
    o, _ = _packed_fwd(qkv, n_head, G, cu_seqlens, *options)
    return o if cu_seqlens is None else o.view(B, T, o.shape[-1])
