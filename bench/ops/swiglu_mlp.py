"""The gated perceptron beside PyTorch's layers and Liger's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import swiglu_mlp
from ...kernels.mlp.swiglu_mlp import cost, launch_bwd, launch_fwd
from .case import Contestant, Operator, forced, randn

# N, D, F: GPT-2's smallest and largest width with as many weights as their perceptrons have, at 32 sequences of 1,024 tokens.
SHAPES = ((32768, 768, 2048), (32768, 1600, 4288))
SMALL_SHAPES = ((128, 128, 344),)


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    N, D, width = shape
    sizes = {"w_gate": (width, D), "w_up": (width, D), "w_down": (D, width)}
    weights = {
        name: randn(*size, dtype=dtype, device=device, scale=size[1] ** -0.5)
        for name, size in sizes.items()
    }
    return {"x": randn(N, D, dtype=dtype, device=device), **weights}


def _eager(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def _liger(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return F.linear(LigerSiLUMulFunction.apply(F.linear(x, w_gate), F.linear(x, w_up)), w_down)


def _launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    N, D, width = shape
    x, w, down = (
        torch.empty(size, dtype=dtype, device="meta") for size in ((N, D), (width, D), (D, width))
    )
    _, gate, up = launch_fwd(x, w, w, down, "auto")
    launch_bwd(x, x, w, w, down, gate, up, [True] * 4)


SWIGLU_MLP = Operator(
    name="swiglu_mlp", sizes=("N", "D", "F"), inputs=_inputs, ours=swiglu_mlp, eager=_eager,
    shapes=SHAPES, small_shapes=SMALL_SHAPES, bound="flops", launches=_launches, launch_shapes=SHAPES[:1],
    # So many rows that plan() fuses, where it does.
    check_shape=lambda shape: (min(shape[0], 4097), *shape[1:]),
    cost=lambda shape, itemsize: cost(*shape, itemsize),
    peers=(
        *(forced("swiglu_mlp", products) for products in ("fused", "cublas")),
        Contestant(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),
    ),
)  # fmt: skip
