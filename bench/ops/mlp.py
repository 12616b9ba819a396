"""The GELU perceptron beside PyTorch's layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import gelu_mlp
from ...kernels.mlp.gelu_mlp import cost, launch_bwd, launch_fwd
from .case import Operator, forced, randn

# N, D with F = 4 D: GPT-2's four widths at 32 sequences of 1,024 tokens.
SHAPES = ((32768, 768), (32768, 1024), (32768, 1280), (32768, 1600))
SMALL_SHAPES = ((128, 128), (256, 256))


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    N, D = shape
    # Outputs of order one, as in a network: weights scaled by 1 / sqrt(fan in).
    weights = {"w1": (4 * D, D), "w2": (D, 4 * D)}
    made = {
        name: randn(*size, dtype=dtype, device=device, scale=size[1] ** -0.5)
        for name, size in weights.items()
    }
    biases = {
        name: randn(size, dtype=dtype, device=device)
        for name, size in {"b1": 4 * D, "b2": D}.items()
    }
    return {"x": randn(N, D, dtype=dtype, device=device), **made, **biases}


def _eager(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def _ours(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return gelu_mlp(x, w1, b1, w2, b2)


def _launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    N, D = shape
    x, w1, b1, w2, b2 = (
        torch.empty(size, dtype=dtype, device="meta")
        for size in ((N, D), (4 * D, D), (4 * D,), (D, 4 * D), (D,))
    )
    _, h, a = launch_fwd(x, w1, b1, w2, b2, "tanh", False, "auto")
    launch_bwd(x, x, w1, w2, h, a, "tanh", "auto", [True] * 5)


GELU_MLP = Operator(
    name="gelu_mlp", sizes=("N", "D"), inputs=_inputs, ours=_ours, eager=_eager,
    shapes=SHAPES, small_shapes=SMALL_SHAPES, bound="flops", launches=_launches, launch_shapes=SHAPES[:1],
    # So many rows that plan() fuses, where it does.
    check_shape=lambda shape: (min(shape[0], 4097), shape[1]),
    cost=lambda shape, itemsize: cost(shape[0], shape[1], 4 * shape[1], itemsize),
    peers=tuple(forced("gelu_mlp", products, approximate="tanh", recompute=False) for products in ("fused", "cublas")),
)  # fmt: skip
