"""Precision and memory layout of operands, before a kernel gets them."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .device import arch
from .triton import TensorDescriptor

TMA_ALIGNMENT = 16  # bytes


def wide(x: Tensor) -> Tensor:
    """Return `x` in at least float32, the precision in which references compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_stride(x: Tensor) -> Tensor:
    """Return `x`, copied if its last stride is not 1. Kernels assume that this stride is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
    if x.data_ptr() % TMA_ALIGNMENT or not _has_tma(arch(x.device)):
        return x
    strides = _tma_strides(x.shape, x.stride(), x.element_size())
    if strides is None:
        return x
    # Skip the constructor: it would check the same conditions again, in half of this function's
    # time. Its optional fields keep their defaults.
    made = object.__new__(TensorDescriptor)
    made.base = x
    made.shape, made.strides, made.block_shape = list(x.shape), list(strides), list(block)
    return made


@functools.cache
def _has_tma(architecture: str) -> bool:
    return architecture.startswith("sm_") and int(architecture[3:]) >= 90


@functools.lru_cache(maxsize=1024)
def _tma_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, ...] | None:
    """Return the strides of a descriptor, or None if TMA cannot load such a tensor."""
    # No load uses the stride of an axis of length 1, so any value may replace it.
    leading = [
        TMA_ALIGNMENT if size == 1 else stride
        for size, stride in zip(shape[:-1], strides[:-1], strict=True)
    ]
    is_aligned = all(stride > 0 and stride * itemsize % TMA_ALIGNMENT == 0 for stride in leading)
    return (*leading, 1) if is_aligned and strides[-1] == 1 and 0 not in shape else None


def strides_bth(**tensors: Tensor) -> dict[str, int]:
    """Return stride_NAMEb, stride_NAMEt and stride_NAMEh of (B, T, H, K) tensors, for a launch."""
    return {
        f"stride_{name}{axis}": stride
        for name, x in tensors.items()
        for axis, stride in zip("bth", x.stride(), strict=False)
    }
