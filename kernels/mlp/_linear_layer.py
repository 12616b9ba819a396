"""A linear layer without autograd, with and without an activation, for linear and mlp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._epilogues import ACTIVATIONS, launch_activation_fwd
from .gemm import gemm, is_fused


def linear_out(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x weight^T + bias to `out`, by cuBLAS."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, matmul: str, h: Tensor
) -> Tensor:
    """Write h = x weight^T + bias, and return its activation.

    `matmul` selects the kernels.
    """
    if is_fused(matmul, x, weight.shape[0]):
        epilogue = ACTIVATIONS[activation].epilogue_fwd
        return gemm(x, weight.t(), bias, epilogue=epilogue, pre=h)
    linear_out(x, weight, bias, h)
    return launch_activation_fwd(h, activation)


def linear_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias. Gradients that are not needed are empty."""
    needs_x, needs_weight, needs_bias = needs
    return (
        torch.mm(dy, weight) if needs_x else dy.new_empty(0),
        torch.mm(dy.t(), x) if needs_weight else dy.new_empty(0),
        dy.sum(0) if needs_bias else dy.new_empty(0),
    )
