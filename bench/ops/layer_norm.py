"""Layer norm, alone and with the residual addition, compared with PyTorch and other libraries."""

import functools

import torch.nn.functional as F
from torch import Tensor

from ...kernels import add_layer_norm, layer_norm
from ...kernels.norm.layer_norm import cost
from .case import Implementation, Operator, Randn


def check_shape(M: int, N: int) -> tuple[int, int]:
    """Keep enough rows that each program has several."""
    return min(M, 4099), N


def _inputs(randn: Randn, M: int, N: int) -> dict[str, Tensor]:
    return {"x": randn(M, N), "weight": randn(N), "bias": randn(N)}


def _add_inputs(randn: Randn, M: int, N: int) -> dict[str, Tensor]:
    return {**_inputs(randn, M, N), "residual": randn(M, N)}


def _after_bias_inputs(randn: Randn, M: int, N: int) -> dict[str, Tensor]:
    return {**_add_inputs(randn, M, N), "added_bias": randn(N)}


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _add_eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _eager(h, weight, bias), h


def _after_bias_eager(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, added_bias: Tensor
) -> tuple[Tensor, Tensor]:
    # Adds 0. The gradient is that of an added bias.
    return _add_eager(x + (added_bias - added_bias.detach()), weight, bias, residual)


def _liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def _flash_attn_add(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, weight, bias, residual=residual, prenorm=True, eps=1e-5)


_COMMON = {
    "sizes": ("M", "N"),
    "check_shape": check_shape,
    # GPT-2's four widths at 32 sequences of 1,024 tokens, and the shape other libraries publish.
    "shapes": ((32768, 768), (32768, 1024), (32768, 1280), (32768, 1600), (8192, 4096)),
    "small_shapes": ((256, 768), (256, 1600)),
    "tiny_shape": (33, 100),
    # One width per tile (1,024 has the tile of 768, 1,280 that of 1,600), and rows too wide for
    # registers, which have their own kernels.
    "launch_shapes": ((32768, 768), (32768, 1600), (8192, 16384)),
    "bound": "bytes",
}
LAYER_NORM = Operator(
    name="layer_norm",
    inputs=_inputs,
    ours=layer_norm,
    eager=_eager,
    cost=cost,
    others=(Implementation(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),),
    **_COMMON,
)
ADD_LAYER_NORM = Operator(
    name="add_layer_norm",
    inputs=_add_inputs,
    ours=add_layer_norm,
    eager=_add_eager,
    cost=functools.partial(cost, residual=True),
    others=(
        Implementation(name="flash-attn", call=_flash_attn_add, needs="flash_attn", cuda_only=True),
    ),
    **_COMMON,
)
# The variant that a block runs.
ADD_LAYER_NORM_AFTER_BIAS = Operator(
    name="add_layer_norm:added_bias",
    inputs=_after_bias_inputs,
    ours=add_layer_norm,
    eager=_after_bias_eager,
    cost=functools.partial(cost, residual=True),
    **_COMMON,
)
