"""The implementations of attention that ATTENTIONS in choices.py names.

    tritium       this project's kernels. They read the packed output of the qkv layer, and apply
                  QK-norm and RoPE to it
    sdpa          PyTorch's scaled_dot_product_attention; packed documents use a (T, T) mask
    flash-attn    the flash-attn package, on CUDA in 16 bits

A packed document can continue in the next row of the batch only with tritium. The others need a
document to begin with each row.

Shapes     q, o: (B, T, H, K)   k, v: (B, T, G, K)
           cu_seqlens: (documents + 1,) int32 over the B T tokens, or None
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import causal_attention, causal_attention_qkvpacked, causal_attention_varlen


class AttentionArguments(NamedTuple):
    """Keyword arguments of an attention function, named as those of causal_attention.

    Args:
        window: how many keys a query sees, itself included. None: all.
        softcap: c > 0 replaces a score s by c tanh(s / c).
        dropout_p: probability of dropping an attention weight.
        seed: seed of the dropout mask, () int64, or None without dropout.
    """

    window: int | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


class NormRopeArguments(NamedTuple):
    """Keyword arguments for RoPE and QK-norm, named as those of causal_attention_qkvpacked.

    Args:
        cos, sin: tables of RoPE, or None.
        q_norm_weight, k_norm_weight: gains of QK-norm, (K,), or None.
        norm_eps: added to the mean square of a head.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    norm_eps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionFunctions:
    """The functions that compute an attention."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionArguments], Tensor]
    """attend(q, k, v, cu_seqlens, options) returns o."""
    attend_packed: Callable[..., Tensor] | None = None
    """attend_packed(qkv, n_head, n_kv_head, cu_seqlens, added_bias, norm_rope, options) returns
    o (B, T, H K). It reads the output of the qkv layer without copies and applies QK-norm and RoPE.
    Its backward gives the layer's bias its gradient. None: the model splits qkv and calls
    `attend`."""


def _tritium(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: AttentionArguments
) -> Tensor:
    if cu_seqlens is None:
        return causal_attention(q, k, v, **options._asdict())
    B, T = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    o = causal_attention_varlen(q, k, v, cu_seqlens, B * T, **options._asdict())
    return o.unflatten(0, (B, T))


def _tritium_packed(
    qkv: Tensor,
    n_head: int,
    n_kv_head: int,
    cu_seqlens: Tensor | None,
    added_bias: Tensor | None,
    norm_rope: NormRopeArguments,
    options: AttentionArguments,
) -> Tensor:
    return causal_attention_qkvpacked(
        qkv,
        n_head,
        n_kv_head=n_kv_head,
        cu_seqlens=cu_seqlens,
        added_bias=added_bias,
        **norm_rope._asdict(),
        **options._asdict(),
    )


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: AttentionArguments
) -> Tensor:
    B, T = q.shape[:2]
    mask = None
    if cu_seqlens is not None:
        token = torch.arange(B * T, device=q.device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, token, right=True).view(B, 1, T)
        is_same_document = document.transpose(1, 2) == document
        mask = is_same_document.tril().unsqueeze(1)  # (B, 1, T, T)
    if options.window is not None:
        token = torch.arange(T, device=q.device)
        distance = token[:, None] - token
        is_seen = (distance >= 0) & (distance < options.window)
        mask = is_seen if mask is None else mask & is_seen
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(
        q, k, v, is_causal=mask is None, attn_mask=mask, enable_gqa=is_grouped
    )
    return o.transpose(1, 2)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: AttentionArguments
) -> Tensor:
    import flash_attn

    # flash-attn counts the keys before the query's own, and takes -1 for all.
    window = (-1, -1) if options.window is None else (options.window - 1, 0)
    settings = {"causal": True, "window_size": window, "softcap": options.softcap}
    if cu_seqlens is None:
        return flash_attn.flash_attn_func(q, k, v, **settings)
    B, T = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    o = flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, T, T, **settings)
    return o.unflatten(0, (B, T))


TRITIUM = AttentionFunctions(attend=_tritium, attend_packed=_tritium_packed)
SDPA = AttentionFunctions(attend=_sdpa)
FLASH_ATTN = AttentionFunctions(attend=_flash)
