"""The GELU and relu2 MLPs, compared with PyTorch's layers."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...kernels import gelu_mlp, relu2_mlp
from ...kernels.mlp.mlp import cost
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


def _gelu_eager(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def _relu2_eager(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1, b1)).square(), w2, b2)


_COMMON: dict[str, Any] = {
    "sizes": ("N", "D"),
    "inputs": _inputs,
    "cost": lambda N, D, itemsize: cost(N, D, 4 * D, itemsize),
    # Enough rows that plan() fuses where it can.
    "check_shape": lambda N, D: (min(N, 4097), D),
    "shapes": SHAPES,
    "small_shapes": ((128, 128), (256, 256)),
    "tiny_shape": (33, 40),
    "launch_shapes": SHAPES[:1],
    "bound": "flops",
}
GELU_MLP = Operator(
    name="gelu_mlp",
    ours=gelu_mlp,
    eager=_gelu_eager,
    others=tuple(
        forced("gelu_mlp", matmul, activation="gelu_tanh", recompute=False)
        for matmul in ("fused", "cublas")
    ),
    **_COMMON,
)
RELU2_MLP = Operator(
    name="relu2_mlp",
    ours=relu2_mlp,
    eager=_relu2_eager,
    others=tuple(
        forced("relu2_mlp", matmul, activation="relu2", recompute=False)
        for matmul in ("fused", "cublas")
    ),
    **_COMMON,
)
