"""Causal attention beside each backend of SDPA and the flash-attention libraries."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import causal_attention
from ...kernels.attention.causal import cost
from ...kernels.attention.launch import launch_bwd, launch_fwd
from ...kernels.attention.options import AttentionOptions
from .case import Contestant, Operator, randn

# B, T, H, K: GPT-2's heads at 1,024 tokens, long contexts at head size 64, and head size 128.
SHAPES = (
    (32, 1024, 12, 64),
    (16, 1024, 25, 64),
    (8, 4096, 12, 64),
    (4, 8192, 12, 64),
    (8, 4096, 16, 128),
)
SMALL_SHAPES = ((2, 128, 4, 64), (1, 257, 2, 64))
# What tells machine codes apart: the head size.
LAUNCH_SHAPES = ((8, 4096, 12, 64), (8, 4096, 16, 128))


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    B, T, H, K = shape
    return {name: randn(B, T, H, K, dtype=dtype, device=device) for name in "qkv"}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, K = q.shape[1], q.shape[-1]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    closed = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(closed, -torch.inf).softmax(-1), v)


def _with(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return call


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def _launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    B, T, H, K = shape
    q, lse = (
        torch.empty(B, T, H, K, dtype=dtype, device="meta"),
        torch.empty(B, H, T, device="meta"),
    )
    options = AttentionOptions(scale=K**-0.5, window=T)
    launch_fwd(q, q, q, None, options)
    launch_bwd(q, None, q, q, q, q, lse, None, options)


ATTENTION = Operator(
    name="causal_attention", sizes=("B", "T", "H", "K"), inputs=_inputs, ours=causal_attention, eager=eager,
    shapes=SHAPES, small_shapes=SMALL_SHAPES, bound="flops", launches=_launches, launch_shapes=LAUNCH_SHAPES,
    check_shape=lambda shape: (1, shape[1], min(shape[2], 2), shape[3]),  # another length may be another path
    cost=lambda shape, itemsize: cost(shape[0], shape[1], shape[1], shape[2], shape[2], shape[3], itemsize),
    peers=(
        Contestant(name="sdpa", call=sdpa),
        Contestant(name="sdpa flash", call=_with(SDPBackend.FLASH_ATTENTION)),
        Contestant(name="sdpa cudnn", call=_with(SDPBackend.CUDNN_ATTENTION), cuda_only=True),
        Contestant(name="sdpa efficient", call=_with(SDPBackend.EFFICIENT_ATTENTION), cuda_only=True),
        Contestant(name="flash-attn 2", call=_flash_attn, needs="flash_attn", cuda_only=True),
        Contestant(name="flash-attn 3", call=_flash_attn_3, needs="flash_attn_interface", cuda_only=True),
    ),
)  # fmt: skip
