"""The GELU MLP, compared with PyTorch's layers."""

import torch.nn.functional as F
from torch import Tensor

from ...kernels import gelu_mlp
from ...kernels.mlp.gelu_mlp import cost
from .case import Operator, Randn, forced

# N, D with F = 4 D: GPT-2's four widths at 32 sequences of 1,024 tokens.
SHAPES = ((32768, 768), (32768, 1024), (32768, 1280), (32768, 1600))


def _inputs(randn: Randn, N: int, D: int) -> dict[str, Tensor]:
    # Weights scaled by 1 / sqrt(fan-in) give outputs of order one, as in a network.
    return {
        "x": randn(N, D),
        "w1": randn(4 * D, D, scale=D**-0.5),
        "w2": randn(D, 4 * D, scale=(4 * D) ** -0.5),
        "b1": randn(4 * D),
        "b2": randn(D),
    }


def _eager(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def _ours(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return gelu_mlp(x, w1, b1, w2, b2)


GELU_MLP = Operator(
    name="gelu_mlp",
    sizes=("N", "D"),
    inputs=_inputs,
    ours=_ours,
    eager=_eager,
    cost=lambda N, D, itemsize: cost(N, D, 4 * D, itemsize),
    # Enough rows that plan() fuses where it can.
    check_shape=lambda N, D: (min(N, 4097), D),
    shapes=SHAPES,
    small_shapes=((128, 128), (256, 256)),
    launch_shapes=SHAPES[:1],
    bound="flops",
    others=tuple(
        forced("gelu_mlp", matmul, approximate="tanh", recompute=False)
        for matmul in ("fused", "cublas")
    ),
)
