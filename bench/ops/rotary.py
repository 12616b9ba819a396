"""Rotary position embedding beside what model code writes in PyTorch, and Liger's."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import rotary
from ...kernels.rotary import cost, launch_rotary
from .case import Contestant, Operator, randn

# Queries of GPT-2's smallest and largest model, and of a Llama with 32 heads of 128.
SHAPES = ((32, 1024, 12, 64), (16, 1024, 25, 64), (4, 4096, 32, 128))
SMALL_SHAPES = ((2, 256, 12, 64),)


@functools.cache
def _tables(T: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.arange(T, device=device)[:, None] * 10_000.0 ** (
        -torch.arange(K // 2, device=device) * 2 / K
    )
    return angle.cos(), angle.sin()


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {"x": randn(*shape, dtype=dtype, device=device)}


def _ours(x: Tensor) -> Tensor:
    return rotary(x, *_tables(x.shape[1], x.shape[3], x.device))


def _eager(x: Tensor) -> Tensor:
    cos, sin = (table.to(x.dtype)[:, None] for table in _tables(x.shape[1], x.shape[3], x.device))
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def _launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    _, T, _, K = shape
    table = torch.empty(T, K // 2, device="meta")
    launch_rotary(torch.empty(shape, dtype=dtype, device="meta"), table, table, False, False)


def _liger(x: Tensor) -> Tensor:
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (
        torch.cat((table, table), -1).to(x.dtype)[None]
        for table in _tables(x.shape[1], x.shape[3], x.device)
    )
    # It turns queries and keys together, in place: one head of keys and a copy of the queries are part of its price.
    heads = x.transpose(1, 2).clone()
    return LigerRopeFunction.apply(heads, heads[:, :1].clone(), cos, sin)[0].transpose(1, 2)


ROTARY = Operator(
    name="rotary", sizes=("B", "T", "H", "K"), inputs=_inputs, ours=_ours, eager=_eager,
    shapes=SHAPES, small_shapes=SMALL_SHAPES, bound="bytes", launches=_launches, launch_shapes=SHAPES[:1],
    check_shape=lambda shape: (1, min(shape[1], 257), *shape[2:]),
    cost=lambda shape, itemsize: cost(shape[0] * shape[1] * shape[2], shape[3], itemsize),
    peers=(Contestant(name="liger", call=_liger, needs="liger_kernel", cuda_only=True),),
)  # fmt: skip
