"""The gradient of added_bias, a bias (N,) that is already part of x (..., N).

The gradient is the sum of dx over all rows, in at least float32.
"""

import torch
from torch import Tensor


def column_sums(dx: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the sum of the rows of dx (..., N) in `dtype`, or an empty tensor if this is None."""
    if dtype is None:
        return dx.new_empty(0)
    sums = torch.promote_types(dx.dtype, torch.float32)
    return dx.reshape(-1, dx.shape[-1]).sum(0, dtype=sums).to(dtype)


def attach(x: Tensor, added_bias: Tensor | None) -> Tensor:
    """Return x. Its gradient also goes to `added_bias`."""
    return x if added_bias is None else _Attach.apply(x, added_bias)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added_bias):
        ctx.dtype = added_bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        needs_x, needs_bias = ctx.needs_input_grad
        return dx if needs_x else None, column_sums(dx, ctx.dtype) if needs_bias else None
