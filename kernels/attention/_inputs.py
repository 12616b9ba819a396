"""Check the tensors that attention takes, and bring them into a layout that its kernels read."""

import torch
from torch import Tensor

from ..core.op import can_read_values


def check_heads(name: str, q: Tensor, k: Tensor, v: Tensor, *, axes: int, shapes: str) -> None:
    """Check q, k and v. They must have `axes` axes; the last two are heads and head size."""
    if q.ndim != axes or k.ndim != axes or v.shape != k.shape:
        raise ValueError(
            f"{name}: {shapes}, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{name}: k and v must have q's head size {q.shape[-1]}, got {tuple(k.shape)}"
        )
    check_head_counts(name, q, k)
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"{name}: q, k and v must have the same float dtype, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"{name}: q, k and v must be on the same device, "
            f"got {q.device}, {k.device} and {v.device}; move them"
        )


def check_head_counts(name: str, q: Tensor, k: Tensor) -> None:
    """Check the number of heads, the second-to-last axis."""
    H, G = q.shape[-2], k.shape[-2]
    if H == 0:
        raise ValueError(f"{name}: q must have at least one head, got {tuple(q.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"{name}: the key heads must divide the {H} query heads, got {G}")


def check_packed(
    name: str,
    qkv: Tensor,
    n_head: int,
    n_kv_head: int,
    added_bias: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Check a packed qkv and what belongs to it. Return the head size."""
    if n_head < 1 or n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(
            f"{name}: n_kv_head must divide n_head, both at least 1, got {n_kv_head} and {n_head}"
        )
    heads = n_head + 2 * n_kv_head
    fits = qkv.ndim == 3 and qkv.shape[-1] > 0 and qkv.shape[-1] % heads == 0
    if not fits or not qkv.is_floating_point():
        raise ValueError(
            f"{name}: qkv must be floating point (B, T, {heads} K) for {n_head} query and "
            f"{n_kv_head} key heads, got {qkv.dtype} {tuple(qkv.shape)}"
        )
    _check_added_bias(name, added_bias, qkv)
    if cu_seqlens is not None:
        check_documents(name, cu_seqlens, qkv.device)
    return qkv.shape[-1] // heads


def _check_added_bias(name: str, added_bias: Tensor | None, qkv: Tensor) -> None:
    """Check that there is no bias, or one number per column of qkv."""
    if added_bias is None:
        return
    fits = added_bias.shape == qkv.shape[-1:] and added_bias.device == qkv.device
    if not fits or not added_bias.is_floating_point():
        raise ValueError(
            f"{name}: added_bias must be floating point ({qkv.shape[-1]},) on {qkv.device} to "
            f"match qkv, got {added_bias.dtype} {tuple(added_bias.shape)} on {added_bias.device}"
        )


def check_documents(name: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """Check the shape, dtype and device of cu_seqlens."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{name}: cu_seqlens must be int32 (documents + 1,), "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(
            f"{name}: cu_seqlens must be on {device} like q, got {cu_seqlens.device}; move it"
        )


def check_document_values(name: str, cu_seqlens: Tensor | None, N: int) -> None:
    """Check that documents follow one another within N tokens, if that needs no synchronization."""
    if cu_seqlens is None or not can_read_values(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > N or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"{name}: cu_seqlens must rise from 0 to at most the {N} tokens, "
            f"got {cu_seqlens.tolist()[:20]}; give the cumulative sums of the documents' lengths"
        )
