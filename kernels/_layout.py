"""How operators take their inputs: in which precision, in which layout."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32: what references compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_rows(x: Tensor) -> Tensor:
    """(..., N) as (M, N) with a unit last stride, copied only where no view can be had."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
