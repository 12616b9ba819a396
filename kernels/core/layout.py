"""Precision and memory layout of operands, before a kernel gets them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .device import arch
from .triton import TensorDescriptor

TMA_ALIGNMENT = 16  # bytes


def wide(x: Tensor) -> Tensor:
    """Return `x` in at least float32, the precision in which references compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_rows(x: Tensor) -> Tensor:
    """Return x (..., N) as (M, N) with a unit last stride: a view if possible, else a copy."""
    # Do not reshape a matrix: that would add a node to the autograd graph.
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def like_rows_of(x: Tensor, y: Tensor) -> Tensor:
    """Undo as_rows: reshape y (M, F) to (..., F), with the leading axes of x (..., N)."""
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def descriptor(x: Tensor, block: Sequence[int]):
    """Return a TMA descriptor that loads blocks of `x`, or `x` itself if TMA cannot load it.

    TMA needs sm_90 or newer, a unit last stride, and other strides and an address that are
    multiples of 16 bytes.
    """
    name = arch(x.device)
    has_tma = name.startswith("sm_") and int(name[3:]) >= 90
    # No load uses the stride of an axis of length 1, so any value may replace it.
    strides = [
        TMA_ALIGNMENT if size == 1 else stride
        for size, stride in zip(x.shape, x.stride(), strict=True)
    ]
    is_aligned = x.data_ptr() % TMA_ALIGNMENT == 0 and all(
        stride > 0 and stride * x.element_size() % TMA_ALIGNMENT == 0 for stride in strides[:-1]
    )
    if has_tma and is_aligned and x.numel() and x.stride(-1) == 1:
        return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], list(block))
    return x


def strides_bth(**tensors: Tensor) -> dict[str, int]:
    """Return stride_NAMEb, stride_NAMEt and stride_NAMEh of (B, T, H, K) tensors, for a launch."""
    return {
        f"stride_{name}{axis}": x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate("bth")
    }
