"""RMS norm, alone and with the residual addition, compared with PyTorch and other libraries."""

import functools

import torch.nn.functional as F
from torch import Tensor

from ...kernels import add_rms_norm, rms_norm
from ...kernels.norm.rms_norm import cost
from .case import Implementation, Operator, Randn
from .layer_norm import check_shape


def _inputs(randn: Randn, M: int, N: int) -> dict[str, Tensor]:
    return {"x": randn(M, N), "weight": randn(N)}


def _add_inputs(randn: Randn, M: int, N: int) -> dict[str, Tensor]:
    return {**_inputs(randn, M, N), "residual": randn(M, N)}


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _add_eager(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _eager(h, weight), h


def _liger(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-6)


def _quack(x: Tensor, weight: Tensor) -> Tensor:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, eps=1e-6)


_COMMON = {
    "sizes": ("M", "N"),
    "check_shape": check_shape,
    "shapes": ((32768, 768), (32768, 1600), (8192, 4096)),
    "small_shapes": ((256, 768), (256, 1600)),
    "tiny_shape": (33, 100),
    # The kernels are layer norm's, whose rows have the tiles of other widths.
    "launch_shapes": ((32768, 1024),),
    "bound": "bytes",
}
RMS_NORM = Operator(
    name="rms_norm",
    inputs=_inputs,
    ours=rms_norm,
    eager=_eager,
    cost=cost,
    others=(
        Implementation(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),
        Implementation(name="quack", call=_quack, needs="quack", cuda_only=True),
    ),
    **_COMMON,
)
ADD_RMS_NORM = Operator(
    name="add_rms_norm",
    inputs=_add_inputs,
    ours=add_rms_norm,
    eager=_add_eager,
    cost=functools.partial(cost, residual=True),
    **_COMMON,
)
