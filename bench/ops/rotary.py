"""Rotary position embedding, compared with the usual PyTorch code and with Liger."""

import functools

import torch
from torch import Tensor

from ...kernels import rotary
from ...kernels.rotary import cost
from .case import Implementation, Operator, Randn

# B, T, H, K: queries of GPT-2's smallest and largest model, and of a Llama with 32 heads of 128.
SHAPES = ((32, 1024, 12, 64), (16, 1024, 25, 64), (4, 4096, 32, 128))


@functools.cache
def tables(T: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, K / 2)."""
    exponent = -torch.arange(K // 2, device=device) * 2 / K
    angle = torch.arange(T, device=device)[:, None] * 10_000.0**exponent
    return angle.cos(), angle.sin()


def _inputs(randn: Randn, B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    return {"x": randn(B, T, H, K)}


def _ours(x: Tensor) -> Tensor:
    return rotary(x, *tables(x.shape[1], x.shape[3], x.device))


def eager_rotary(x: Tensor) -> Tensor:
    cos, sin = (table.to(x.dtype)[:, None] for table in tables(x.shape[1], x.shape[3], x.device))
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def _liger(x: Tensor) -> Tensor:
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (
        torch.cat((table, table), -1).to(x.dtype)[None]
        for table in tables(x.shape[1], x.shape[3], x.device)
    )
    # Liger rotates queries and keys together, in place: one head of keys and a copy of the queries
    # are part of its cost.
    heads = x.transpose(1, 2).clone()
    return LigerRopeFunction.apply(heads, heads[:, :1].clone(), cos, sin)[0].transpose(1, 2)


ROTARY = Operator(
    name="rotary",
    sizes=("B", "T", "H", "K"),
    inputs=_inputs,
    ours=_ours,
    eager=eager_rotary,
    cost=lambda B, T, H, K, itemsize: cost(B * T * H, K, itemsize),
    check_shape=lambda B, T, H, K: (1, min(T, 257), H, K),
    shapes=SHAPES,
    small_shapes=((2, 256, 12, 64),),
    tiny_shape=(1, 33, 2, 32),
    launch_shapes=SHAPES[:1],
    bound="bytes",
    others=(Implementation(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),),
)
