"""A linear layer without autograd, with and without GELU, for linear and gelu_mlp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._epilogues import EPILOGUES, launch_activation_fwd
from .gemm import gemm, is_fused


def linear_out(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x weight^T + bias to `out`, by cuBLAS."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, matmul: str, h: Tensor
) -> Tensor:
    """Write h = x weight^T + bias, and return gelu(h), by the kernels that `matmul` selects."""
    if is_fused(matmul, x, weight.shape[0]):
        return gemm(x, weight.t(), bias, epilogue=EPILOGUES[approximate][0], pre=h)
    linear_out(x, weight, bias, h)
    return launch_activation_fwd(h, approximate)


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
