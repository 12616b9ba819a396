"""The implementations of attention that a model can train with: the rows of ATTENTIONS.

    tritium       this project's kernels. Without RoPE they read the packed output of the qkv layer
    sdpa          PyTorch's scaled_dot_product_attention; packed documents use a (T, T) mask
    flash-attn    the flash-attn package, on CUDA in 16 bits

Shapes     q, o: (B, T, H, K)   k, v: (B, T, G, K)
           cu_seqlens: (documents + 1,) int32 over the B T tokens, or None
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import causal_attention, causal_attention_qkvpacked, causal_attention_varlen


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """An implementation that the option `attention` names."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """attend(q, k, v, cu_seqlens) returns o."""
    operators: tuple[str, ...]
    """How the names of its forward operators start. Selective checkpointing keeps their outputs."""
    attend_packed: Callable[[Tensor, int, int, Tensor | None, Tensor | None], Tensor] | None = None
    """attend_packed(qkv, n_head, n_kv_head, cu_seqlens, added_bias) returns o (B, T, H K). It reads
    the output of the qkv layer without copies. Its backward gives the layer's bias its gradient.
    None: the model splits qkv and calls `attend`."""
    needs: str | None = None
    """The module that must be installed."""
    needs_16_bit_cuda: bool = False
    """Whether it runs only on CUDA and only in 16 bits."""


def choose_attention(name: str) -> AttentionRow:
    """Return a row. Raises: ValueError for an unknown name, or if its package is not installed."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention: expected {', '.join(ATTENTIONS)}, got {name!r}")
    row = ATTENTIONS[name]
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        raise ValueError(
            f"attention: expected an installed {name}, found none; pip install 'tritium[{name}]', "
            "or set attention to tritium"
        )
    return row


def _tritium(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return causal_attention(q, k, v)
    B, T = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return causal_attention_varlen(q, k, v, cu_seqlens, B * T).unflatten(0, (B, T))


def _tritium_packed(
    qkv: Tensor, n_head: int, n_kv_head: int, cu_seqlens: Tensor | None, added_bias: Tensor | None
) -> Tensor:
    return causal_attention_qkvpacked(
        qkv, n_head, n_kv_head=n_kv_head, cu_seqlens=cu_seqlens, added_bias=added_bias
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    mask = None
    if cu_seqlens is not None:
        B, T = q.shape[:2]
        token = torch.arange(B * T, device=q.device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, token, right=True).view(B, 1, T)
        is_same_document = document.transpose(1, 2) == document
        mask = is_same_document.tril().unsqueeze(1)  # (B, 1, T, T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(
        q, k, v, is_causal=mask is None, attn_mask=mask, enable_gqa=is_grouped
    )
    return o.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    import flash_attn

    if cu_seqlens is None:
        return flash_attn.flash_attn_func(q, k, v, causal=True)
    B, T = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    o = flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, T, T, causal=True)
    return o.unflatten(0, (B, T))


ATTENTIONS = {
    "tritium": AttentionRow(
        attend=_tritium,
        attend_packed=_tritium_packed,
        operators=("tritium::causal_attention",),
    ),
    "sdpa": AttentionRow(
        attend=_sdpa,
        operators=(
            "aten::_scaled_dot_product_flash",
            "aten::_scaled_dot_product_efficient",
            "aten::_scaled_dot_product_cudnn",
        ),
    ),
    "flash-attn": AttentionRow(
        attend=_flash,
        operators=("flash_attn::_flash_attn",),
        needs="flash_attn",
        needs_16_bit_cuda=True,
    ),
}
