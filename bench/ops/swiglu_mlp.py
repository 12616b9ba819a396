"""The SwiGLU MLP, compared with PyTorch's layers and Liger's."""

import torch.nn.functional as F
from torch import Tensor

from ...kernels import swiglu_mlp
from ...kernels.mlp.swiglu_mlp import cost
from .case import Implementation, Operator, Randn, forced

# N, D, F: GPT-2's smallest and largest width, 32 sequences of 1,024 tokens. F gives as many
# weights as GPT-2's MLP has.
SHAPES = ((32768, 768, 2048), (32768, 1600, 4288))


def _inputs(randn: Randn, N: int, D: int, width: int) -> dict[str, Tensor]:
    return {
        "x": randn(N, D),
        "w_gate": randn(width, D, scale=D**-0.5),
        "w_up": randn(width, D, scale=D**-0.5),
        "w_down": randn(D, width, scale=width**-0.5),
    }


def _eager(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def _liger(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return F.linear(LigerSiLUMulFunction.apply(F.linear(x, w_gate), F.linear(x, w_up)), w_down)


SWIGLU_MLP = Operator(
    name="swiglu_mlp",
    sizes=("N", "D", "F"),
    inputs=_inputs,
    ours=swiglu_mlp,
    eager=_eager,
    cost=cost,
    # Enough rows that plan() fuses where it can.
    check_shape=lambda N, D, width: (min(N, 4097), D, width),
    shapes=SHAPES,
    small_shapes=((128, 128, 344),),
    tiny_shape=(33, 40, 56),
    launch_shapes=SHAPES[:1],
    bound="flops",
    others=(
        *(forced("swiglu_mlp", matmul) for matmul in ("fused", "cublas")),
        Implementation(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),
    ),
)
