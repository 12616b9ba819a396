"""Which attention a model computes with: rows of one table, chosen by name.

    tritium       this project's kernels; straight from and into what linear layers wrote where nothing turns the heads
    sdpa          PyTorch's, with the backend that it chooses; packed documents through a mask of T x T
    flash-attn    the package of that name, extra `flash-attn`: GPUs and 16 bits only

Shapes     q, o: (B, T, H, K)   k, v: (B, T, G, K)   cu_seqlens: (documents + 1,) int32 over the B T tokens, or None
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import causal_attention, causal_attention_qkvpacked, causal_attention_varlen


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A row: `attend(q, k, v, cu_seqlens)`, and `packed(qkv, n_head, n_kv_head, cu_seqlens)` where it saves copies."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    packed: Callable[[Tensor, int, int, Tensor | None], Tensor] | None = None
    needs: str | None = None


def choose_attention(name: str) -> Implementation:
    """Look a row up. Raises: ValueError if there is none of that name, or its package is not installed."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention: expected {', '.join(ATTENTIONS)}, got {name!r}")
    row = ATTENTIONS[name]
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        raise ValueError(
            f"attention: expected an installed {name}, found none; pip install 'tritium[{name}]', or take tritium"
        )
    return row


def _ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return causal_attention(q, k, v)
    B, T = q.shape[:2]
    return causal_attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens, B * T
    ).unflatten(0, (B, T))


def _ours_packed(qkv: Tensor, n_head: int, n_kv_head: int, cu_seqlens: Tensor | None) -> Tensor:
    return causal_attention_qkvpacked(qkv, n_head, n_kv_head=n_kv_head, cu_seqlens=cu_seqlens)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    (B, T), mask = q.shape[:2], None
    if cu_seqlens is not None:
        token = torch.arange(B * T, device=q.device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, token, right=True).view(B, 1, T)
        mask = (document.transpose(1, 2) == document).tril().unsqueeze(1)  # (B, 1, T, T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"is_causal": mask is None, "attn_mask": mask, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    import flash_attn

    if cu_seqlens is None:
        return flash_attn.flash_attn_func(q, k, v, causal=True)
    (B, T), packed = q.shape[:2], (x.flatten(0, 1) for x in (q, k, v))
    o = flash_attn.flash_attn_varlen_func(*packed, cu_seqlens, cu_seqlens, T, T, causal=True)
    return o.unflatten(0, (B, T))


ATTENTIONS = {
    "tritium": Implementation(attend=_ours, packed=_ours_packed),
    "sdpa": Implementation(attend=_sdpa),
    "flash-attn": Implementation(attend=_flash, needs="flash_attn"),
}
