"""The language-model head with its loss.

Compared with the unfused pair, PyTorch's fused operator and Liger's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import linear_cross_entropy
from ...kernels.loss.linear_cross_entropy import cost
from .case import Implementation, Operator, Randn

# N, D, V: 16 and 64 sequences of 1,024 tokens at GPT-2's smallest and largest width.
SHAPES = ((16384, 768, 50304), (65536, 768, 50304), (16384, 1600, 50304))


def _inputs(randn: Randn, N: int, D: int, V: int) -> dict[str, Tensor]:
    return {
        "x": randn(N, D),
        "weight": randn(V, D, scale=D**-0.5),
        "target": torch.randint(V, (N,)),
    }


def _eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def _native(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, target)


def _liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


# New in torch 2.13.
_NATIVE = (
    (Implementation(name="F.linear_cross_entropy", call=_native),)
    if hasattr(F, "linear_cross_entropy")
    else ()
)

LINEAR_CROSS_ENTROPY = Operator(
    name="linear_cross_entropy",
    sizes=("N", "D", "V"),
    inputs=_inputs,
    ours=linear_cross_entropy,
    eager=_eager,
    cost=cost,
    check_shape=lambda N, D, V: (min(N, 613), D, V),
    shapes=SHAPES,
    small_shapes=((128, 64, 4096), (64, 64, 8191)),
    tiny_shape=(33, 40, 500),
    launch_shapes=SHAPES[:1],
    bound="flops",
    others=(
        *_NATIVE,
        Implementation(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),
    ),
)
