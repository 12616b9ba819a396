"""Layer norm, alone and with the residual addition, beside PyTorch's and the libraries' own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import add_layer_norm, layer_norm
from ...kernels.norm.layer_norm import cost, launch_add_fwd, launch_bwd, launch_fwd
from .case import Contestant, Operator, randn

# GPT-2's four widths at 32 sequences of 1,024 tokens, and the shape other libraries publish.
SHAPES = ((32768, 768), (32768, 1024), (32768, 1280), (32768, 1600), (8192, 4096))
SMALL_SHAPES = ((256, 768), (256, 1600))
# One width of each tile (1,024 has that of 768, 1,280 that of 1,600), and rows too wide for registers, which have kernels of
# their own.
LAUNCH_SHAPES = ((32768, 768), (32768, 1600), (8192, 16384))


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """So many rows that each program has several."""
    return min(shape[0], 4099), shape[1]


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    M, N = shape
    return {
        name: randn(*size, dtype=dtype, device=device)
        for name, size in {"x": (M, N), "weight": (N,), "bias": (N,)}.items()
    }


def _add_inputs(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    return {**_inputs(shape, dtype, device), "residual": randn(*shape, dtype=dtype, device=device)}


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _add_eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _eager(h, weight, bias), h


def _ours_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, residual, weight, bias)


def _liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def _flash_attn_add(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, weight, bias, residual=residual, prenorm=True, eps=1e-5)


def _launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    x, w, statistics = meta(shape, dtype)
    launch_fwd(x, w, w, 1e-5)
    launch_bwd(x, None, x, w, statistics, statistics, True)


def _add_launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    x, w, statistics = meta(shape, dtype)
    launch_add_fwd(x, x, w, w, 1e-5)
    launch_bwd(x, x, x, w, statistics, statistics, True)


def meta(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, a weight and a statistic of each row, without data."""
    M, N = shape
    x, w = (torch.empty(size, dtype=dtype, device="meta") for size in ((M, N), (N,)))
    return x, w, torch.empty(M, device="meta")


_COMMON = {
    "sizes": ("M", "N"),
    "check_shape": check_shape,
    "shapes": SHAPES,
    "small_shapes": SMALL_SHAPES,
    "launch_shapes": LAUNCH_SHAPES,
    "bound": "bytes",
}
LAYER_NORM = Operator(
    name="layer_norm", inputs=_inputs, ours=layer_norm, eager=_eager, launches=_launches,
    cost=lambda shape, itemsize: cost(*shape, itemsize),
    peers=(Contestant(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),),
    **_COMMON,
)  # fmt: skip
ADD_LAYER_NORM = Operator(
    name="add_layer_norm", inputs=_add_inputs, ours=_ours_add, eager=_add_eager, launches=_add_launches,
    cost=lambda shape, itemsize: cost(*shape, itemsize, residual=True),
    peers=(Contestant(name="flash-attn", call=_flash_attn_add, needs="flash_attn", cuda_only=True),),
    **_COMMON,
)  # fmt: skip
