"""A linear layer with GELU, compared with PyTorch's operators."""

import functools

import torch.nn.functional as F
from torch import Tensor

from ...kernels import linear
from ...kernels.mlp.linear import cost
from .case import Operator, Randn, forced

# N, D, F: the first layer of GPT-2's smallest and largest MLP, 32 sequences of 1,024 tokens.
SHAPES = ((32768, 768, 3072), (32768, 1600, 6400))


def _inputs(randn: Randn, N: int, D: int, width: int) -> dict[str, Tensor]:
    return {
        "x": randn(N, D),
        "weight": randn(width, D, scale=D**-0.5),
        "bias": randn(width),
    }


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


LINEAR = Operator(
    name="linear",
    sizes=("N", "D", "F"),
    inputs=_inputs,
    ours=functools.partial(linear, activation="gelu_tanh"),
    eager=_eager,
    cost=cost,
    # Enough rows that plan() fuses where it can.
    check_shape=lambda N, D, width: (min(N, 4097), D, width),
    shapes=SHAPES,
    small_shapes=((128, 128, 512),),
    tiny_shape=(33, 40, 160),
    # Its kernels are those of gelu_mlp.
    launch_shapes=(),
    bound="flops",
    others=tuple(
        forced("linear", matmul, activation="gelu_tanh") for matmul in ("fused", "cublas")
    ),
)
