"""Plain attention on a CPU: PyTorch's scaled_dot_product_attention (SDPA), or two matmuls.

Short sequences take matmuls of whole heads, although half of the scores are not needed. Forward and
backward of 16 x 128 x 2 x 64 take 5.8 ms, with SDPA 8.2 ms. For 12 x 64 x 4 x 32 they take 1.9 and
3.2 ms, for 8 x 256 x 4 x 64 19 and 23 ms (two cores of an AMD EPYC with AVX2, November 2026).
"""

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..core.op import is_eager, is_transformed
from .options import AttentionOptions

# The scores of a longer sequence take more memory than they save time.
SHORT = 256


def is_plain(T: int, S: int, cu_seqlens: Tensor | None, options: AttentionOptions) -> bool:
    """Whether SDPA applies: as many queries as keys, no documents, no option except `scale`."""
    has_options = options.softcap > 0 or options.dropout_p > 0
    return cu_seqlens is None and T == S <= options.window and not has_options


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Return o, and an empty tensor in place of lse."""
    H = q.shape[2]
    if is_short(q, H, k.shape[2]):
        qkv = torch.stack((q, k, v), 2).flatten(2)
        return short_attention(qkv, H, options.scale).unflatten(2, (H, -1)), q.new_empty(0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, K)
    o = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=options.scale, enable_gqa=True
    )
    return o.transpose(1, 2).contiguous(), o.new_empty(0)


def is_short(x: Tensor, n_head: int, n_kv_head: int) -> bool:
    """Whether short_attention applies to x (B, T, ...): float32, and no grouped heads."""
    # torch.func cannot transform it, and torch.compile fuses SDPA itself.
    is_plain_call = is_eager(x) and not is_transformed()
    fits = n_head == n_kv_head and x.shape[1] <= SHORT and x.dtype == torch.float32
    return fits and is_plain_call


def short_attention(qkv: Tensor, n_head: int, scale: float) -> Tensor:
    """Plain attention of short sequences: qkv (B, T, 3 H K) -> o (B, T, H K)."""
    return _ShortAttention.apply(qkv, n_head, scale)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head, scale):
        B, T = qkv.shape[:2]
        ctx.shape = B, T, 3, n_head, qkv.shape[2] // (3 * n_head)
        ctx.scale = scale
        q, k, v = _by_head(qkv.view(ctx.shape))
        p = torch.softmax(torch.baddbmm(_mask(T, qkv.dtype), q, k.mT, alpha=scale), -1)
        ctx.save_for_backward(q, k, v, p)
        # Explicit sizes: -1 would be ambiguous for an empty tensor.
        heads = torch.bmm(p, v).view(B, n_head, T, ctx.shape[-1])
        return heads.transpose(1, 2).reshape(B, T, n_head * ctx.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, p = ctx.saved_tensors
        B, T, _, H, K = ctx.shape
        (do,) = _by_head(do.view(B, T, 1, H, K))
        dqkv = do.new_empty(3, *q.shape)
        dq, dk, dv = dqkv
        torch.bmm(p.mT, do, out=dv)
        # The gradient of softmax: ds = p (dp - sum_j p_j dp_j).
        ds = torch._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype).mul_(ctx.scale)
        torch.bmm(ds, k, out=dq)
        torch.bmm(ds.mT, q, out=dk)
        dqkv = dqkv.view(3, B, H, T, K).permute(1, 3, 0, 2, 4)
        return dqkv.reshape(B, T, 3 * H * K), None, None


@functools.lru_cache(maxsize=8)
def _mask(T: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores (T, T): minus infinity for keys after the query."""
    return torch.full((T, T), -math.inf, dtype=dtype).triu_(1)


def _by_head(x: Tensor) -> Tensor:
    """Copy (B, T, n, H, K) to (n, B H, T, K)."""
    return x.permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()
