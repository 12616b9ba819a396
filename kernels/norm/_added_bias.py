"""The gradient of added_bias, a bias (N,) that is already part of x (M, N).

The gradient is the sum of the rows of dx. It is computed from dx before dx is rounded.
"""

import torch
from torch import Tensor


def column_sums(dx: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the sum of the rows of dx in `dtype`, or an empty tensor if this is None."""
    return dx.new_empty(0) if dtype is None else dx.sum(0).to(dtype)


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
        return dx, column_sums(dx, ctx.dtype)
