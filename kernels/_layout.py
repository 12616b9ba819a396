"""How operators take their inputs: in which precision, in which layout."""

import torch
from torch import Tensor


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
