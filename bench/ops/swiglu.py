"""SwiGLU alone, compared with PyTorch's operators and with Liger."""

import torch.nn.functional as F
from torch import Tensor

from ...kernels import swiglu
from ...kernels.mlp.swiglu import cost
from .case import Implementation, Operator, Randn

# N, F: the hidden layers of the SwiGLU MLPs in swiglu_mlp.py.
SHAPES = ((32768, 2048), (32768, 4288))


def _inputs(randn: Randn, N: int, width: int) -> dict[str, Tensor]:
    return {"gate": randn(N, width), "up": randn(N, width)}


def _eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _liger(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


SWIGLU = Operator(
    name="swiglu",
    sizes=("N", "F"),
    inputs=_inputs,
    ours=swiglu,
    eager=_eager,
    cost=lambda N, width, itemsize: cost(N * width, itemsize),
    check_shape=lambda N, width: (min(N, 257), width),
    shapes=SHAPES,
    small_shapes=((256, 344),),
    tiny_shape=(33, 40),
    launch_shapes=SHAPES[:1],
    bound="bytes",
    others=(Implementation(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),),
)
