"""Cross-entropy of materialized logits beside PyTorch's and the libraries'."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import cross_entropy
from ...kernels.loss.cross_entropy import cost, launch_bwd, launch_fwd
from ...kernels.loss.options import LossOptions
from .case import Contestant, Operator, randn

SHAPES = ((8192, 50304), (16384, 50304), (4096, 128256), (32768, 32768))
SMALL_SHAPES = ((64, 4096), (16, 50257))
# The published vocabulary, whose rows begin at any distance from a multiple of 16 bytes.
LAUNCH_SHAPES = ((8192, 50257),)


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    M, V = shape
    return {
        "logits": randn(M, V, dtype=dtype, device=device),
        "target": torch.randint(V, (M,), device=device),
    }


def _eager(logits: Tensor, target: Tensor) -> Tensor:
    # float32 inside, as autocast has it: the plain bf16 loss has three digits.
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def _liger(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # It writes the gradient over the logits, which the next call needs: the copy is part of its price.
    return LigerCrossEntropyFunction.apply(
        logits.clone(), target, None, -100, 0.0, 0.0, "mean", None, False
    )[0]


def _quack(logits: Tensor, target: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy as quack_cross_entropy

    return quack_cross_entropy(logits, target, reduction="mean")


def _launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    M, V = shape
    logits, target = (
        torch.empty(M, V, dtype=dtype, device="meta"),
        torch.empty(M, dtype=torch.int64, device="meta"),
    )
    options = LossOptions()
    loss, statistics, divisor = launch_fwd(logits, target, options)
    launch_bwd(loss, logits, target, statistics, divisor, options)


CROSS_ENTROPY = Operator(
    name="cross_entropy", sizes=("M", "V"), inputs=_inputs, ours=cross_entropy, eager=_eager,
    shapes=SHAPES, small_shapes=SMALL_SHAPES, bound="bytes", launches=_launches, launch_shapes=LAUNCH_SHAPES,
    check_shape=lambda shape: (min(shape[0], 61), shape[1]),
    cost=lambda shape, itemsize: cost(*shape, itemsize),
    peers=(
        Contestant(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),
        Contestant(name="quack", call=_quack, needs="quack", cuda_only=True),
    ),
)  # fmt: skip
