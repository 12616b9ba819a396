"""Attention of new tokens to a key-value cache, compared with SDPA over the same cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import attention_decode
from ...kernels.attention.decode import cost
from .case import Implementation, Operator, Randn

# B, T, S, H, G, K: one sequence that must fill the GPU, a batch of GPT-2's, grouped heads.
SHAPES = ((1, 1, 8192, 32, 32, 128), (64, 1, 1024, 12, 12, 64), (16, 1, 8192, 32, 8, 128))


def _inputs(randn: Randn, B: int, T: int, S: int, H: int, G: int, K: int) -> dict[str, Tensor]:
    return {
        # Without gradients: the operator is for inference.
        "q": randn(B, T, H, K).detach(),
        "k_cache": randn(B, S, G, K).detach(),
        "v_cache": randn(B, S, G, K).detach(),
        "cache_lengths": torch.full((B,), S, dtype=torch.int32),
    }


def _eager(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k_cache, v_cache))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    T, S = scores.shape[-2:]
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def _sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor) -> Tensor:
    # One new token sees every key of a full cache: no mask is needed.
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    o = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)


ATTENTION_DECODE = Operator(
    name="attention_decode",
    sizes=("B", "T", "S", "H", "G", "K"),
    inputs=_inputs,
    ours=attention_decode,
    eager=_eager,
    cost=cost,
    check_shape=lambda B, *sizes: (1, *sizes),
    shapes=SHAPES,
    small_shapes=((2, 1, 300, 4, 2, 64),),
    tiny_shape=(2, 1, 40, 2, 1, 32),
    launch_shapes=SHAPES[2:],
    bound="bytes",
    others=(Implementation(name="sdpa", call=_sdpa),),
)
