"""Causal attention, compared with each backend of SDPA and the flash-attention libraries."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import causal_attention
from ...kernels.attention import launch
from ...kernels.attention.causal import cost
from .case import Implementation, Operator, Randn

# B, T, H, K: heads of GPT-2 at 1,024 tokens, long contexts at head size 64, and head size 128.
SHAPES = (
    (32, 1024, 12, 64),
    (16, 1024, 25, 64),
    (8, 4096, 12, 64),
    (4, 8192, 12, 64),
    (8, 4096, 16, 128),
)


@contextmanager
def backward_in(passes: str) -> Iterator[None]:
    """Make the backward of attention take "one pass", "two passes" or "auto": see BACKWARD."""
    with mock.patch.object(launch, "BACKWARD", passes):
        yield


def _inputs(randn: Randn, B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    return {name: randn(B, T, H, K) for name in "qkv"}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, K = q.shape[1], q.shape[-1]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(future, -torch.inf).softmax(-1), v)


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


ATTENTION = Operator(
    name="causal_attention",
    sizes=("B", "T", "H", "K"),
    inputs=_inputs,
    ours=causal_attention,
    eager=eager,
    cost=lambda B, T, H, K, itemsize: cost(B, T, T, H, H, K, itemsize),
    # The length stays: another one may take another path.
    check_shape=lambda B, T, H, K: (1, T, min(H, 2), K),
    shapes=SHAPES,
    small_shapes=((2, 128, 4, 64), (1, 257, 2, 64)),
    tiny_shape=(1, 67, 2, 32),
    # Tiles depend on the head size and the length.
    launch_shapes=((32, 1024, 12, 64), (8, 4096, 12, 64), (8, 4096, 16, 128)),
    launch_variants=(((32, 1024, 12, 64), functools.partial(backward_in, "auto")),),
    bound="flops",
    others=(
        Implementation(name="sdpa", call=sdpa),
        Implementation(name="sdpa flash", call=_with(SDPBackend.FLASH_ATTENTION)),
        Implementation(name="sdpa cudnn", call=_with(SDPBackend.CUDNN_ATTENTION), cuda_only=True),
        Implementation(
            name="sdpa efficient", call=_with(SDPBackend.EFFICIENT_ATTENTION), cuda_only=True
        ),
        Implementation(name="flash-attn 2", call=_flash_attn, needs="flash_attn", cuda_only=True),
        Implementation(
            name="flash-attn 3", call=_flash_attn_3, needs="flash_attn_interface", cuda_only=True
        ),
    ),
)
