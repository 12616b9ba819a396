"""Root-mean-square norm, alone and with the residual addition, beside PyTorch's and the libraries' own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import add_rms_norm, rms_norm
from ...kernels.norm.rms_norm import cost, launch_add_fwd, launch_bwd, launch_fwd
from .case import Contestant, Operator, randn
from .layer_norm import check_shape, meta

SHAPES = ((32768, 768), (32768, 1600), (8192, 4096))
SMALL_SHAPES = ((256, 768), (256, 1600))
# The tiles of other widths are in layer norm's rows, whose kernels these are.
LAUNCH_SHAPES = ((32768, 1024),)


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    M, N = shape
    return {
        "x": randn(M, N, dtype=dtype, device=device),
        "weight": randn(N, dtype=dtype, device=device),
    }


def _add_inputs(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    return {**_inputs(shape, dtype, device), "residual": randn(*shape, dtype=dtype, device=device)}


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _add_eager(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _eager(h, weight), h


def _ours_add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, residual, weight)


def _liger(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-6)


def _quack(x: Tensor, weight: Tensor) -> Tensor:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, eps=1e-6)


def _launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    x, weight, rstd = meta(shape, dtype)
    launch_fwd(x, weight, 1e-6)
    launch_bwd(x, None, x, weight, rstd)


def _add_launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    x, weight, rstd = meta(shape, dtype)
    launch_add_fwd(x, x, weight, 1e-6)
    launch_bwd(x, x, x, weight, rstd)


_COMMON = {
    "sizes": ("M", "N"),
    "check_shape": check_shape,
    "shapes": SHAPES,
    "small_shapes": SMALL_SHAPES,
    "launch_shapes": LAUNCH_SHAPES,
    "bound": "bytes",
}
RMS_NORM = Operator(
    name="rms_norm", inputs=_inputs, ours=rms_norm, eager=_eager, launches=_launches,
    cost=lambda shape, itemsize: cost(*shape, itemsize),
    peers=(
        Contestant(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),
        Contestant(name="quack", call=_quack, needs="quack", cuda_only=True),
    ),
    **_COMMON,
)  # fmt: skip
ADD_RMS_NORM = Operator(
    name="add_rms_norm", inputs=_add_inputs, ours=_ours_add, eager=_add_eager, launches=_add_launches,
    cost=lambda shape, itemsize: cost(*shape, itemsize, residual=True), **_COMMON,
)  # fmt: skip
