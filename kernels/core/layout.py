"""How operators take their inputs: in which precision, in which layout, through which kind of pointer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .device import arch
from .triton import TensorDescriptor


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32: what references compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_rows(x: Tensor) -> Tensor:
    """(..., N) as (M, N) with a unit last stride, copied only where no view can be had."""
    # A view of what has two axes already would still cost autograd a node, forward and backward.
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def like_rows_of(x: Tensor, y: Tensor) -> Tensor:
    """Rows y (M, F) under the leading axes of x (..., N), whose rows gave them: (..., F)."""
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def descriptor(x: Tensor, block: Sequence[int]):
    """A TMA descriptor that loads blocks of `x`, or `x` itself where the architecture or the alignment allows none."""
    name = arch(x.device)
    # A stride of an axis of length 1 is never taken, whatever it is.
    strides = [
        16 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    ]
    aligned = x.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides[:-1]
    )
    if (
        not (name.startswith("sm_") and int(name[3:]) >= 90 and aligned and x.numel())
        or x.stride(-1) != 1
    ):
        return x
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], list(block))


def strides_bth(**tensors: Tensor) -> dict[str, int]:
    """Keyword arguments stride_NAMEb, stride_NAMEt, stride_NAMEh of (B, T, heads, K) tensors."""
    return {
        f"stride_{name}{axis}": x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate("bth")
    }
