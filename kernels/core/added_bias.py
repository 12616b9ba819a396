"""The gradient of added_bias, a bias (N,) that is already part of x (..., N).

The gradient is the sum of dx over all rows, in at least float32.
"""

import torch
from torch import Tensor

from ._direct import is_transformed


def column_sums(dx: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the sum of the rows of dx (..., N) in `dtype`, or an empty tensor if this is None."""
    if dtype is None:
        return dx.new_empty(0)
    sums = torch.promote_types(dx.dtype, torch.float32)
    return dx.reshape(-1, dx.shape[-1]).sum(0, dtype=sums).to(dtype)


def attach(x: Tensor, added_bias: Tensor | None) -> Tensor:
    """Return x. Its gradient also goes to `added_bias`."""
    if added_bias is None:
        return x
    if is_transformed():
        # torch.func cannot transform _Attach. A method setup_context would change this, but each
        # call would take 60 us more (AMD EPYC, November 2026), and torch.compile of torch.func.grad
        # would lose the gradient of the bias.
        return x + (added_bias - added_bias.detach()).to(x.dtype)
    return _Attach.apply(x, added_bias)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added_bias):
        ctx.dtype = added_bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        needs_x, needs_bias = ctx.needs_input_grad
        return dx if needs_x else None, column_sums(dx, ctx.dtype) if needs_bias else None
