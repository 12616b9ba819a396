"""Cross-entropy of materialized logits, compared with PyTorch and other libraries."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import cross_entropy
from ...kernels.loss.cross_entropy import cost
from .case import Implementation, Operator, Randn


def _inputs(randn: Randn, M: int, V: int) -> dict[str, Tensor]:
    return {
        "logits": randn(M, V),
        "target": torch.randint(V, (M,)),
    }


def _eager(logits: Tensor, target: Tensor) -> Tensor:
    # float32 inside, as under autocast: a bfloat16 loss has three digits.
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def _liger(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # Liger overwrites the logits, which the next call needs: the copy is part of its cost.
    return LigerCrossEntropyFunction.apply(
        logits.clone(), target, None, -100, 0.0, 0.0, "mean", None, False
    )[0]


def _quack(logits: Tensor, target: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy as quack_cross_entropy

    return quack_cross_entropy(logits, target, reduction="mean")


CROSS_ENTROPY = Operator(
    name="cross_entropy",
    sizes=("M", "V"),
    inputs=_inputs,
    ours=cross_entropy,
    eager=_eager,
    cost=cost,
    check_shape=lambda M, V: (min(M, 61), V),
    shapes=((8192, 50304), (16384, 50304), (4096, 128256), (32768, 32768)),
    small_shapes=((64, 4096), (16, 50257)),
    tiny_shape=(5, 1000),
    # GPT-2's published vocabulary: its rows are not aligned to 16 bytes.
    launch_shapes=((8192, 50257),),
    bound="bytes",
    others=(
        Implementation(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),
        Implementation(name="quack", call=_quack, needs="quack", cuda_only=True),
    ),
)
