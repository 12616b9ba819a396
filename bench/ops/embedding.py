"""Embedding of tokens and positions, cast to the dtype of the model, compared with PyTorch.

As in training, the weights are float32, and the order of the tokens comes from the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import embedding
from ...kernels.embedding import cost, order_of
from .case import Operator, Randn

# B, T, D, V: sequences of 1,024 tokens at GPT-2's smallest and largest width.
SHAPES = ((32, 1024, 768, 50304), (64, 1024, 768, 50304), (16, 1024, 1600, 50304))


def _inputs(randn: Randn, B: int, T: int, D: int, V: int) -> dict[str, Tensor]:
    # The frequency of a token is about proportional to 1 / (token + 1), as in text.
    tokens = (V ** torch.rand(B, T)).long().clamp(1, V) - 1
    return {
        "tokens": tokens,
        "weight": torch.randn(V, D).requires_grad_(),
        "position_weight": torch.randn(T, D).requires_grad_(),
        "order": order_of(tokens),
        "like": randn(0).detach(),  # has the dtype of the result
    }


def _ours(
    tokens: Tensor, weight: Tensor, position_weight: Tensor, order: Tensor, like: Tensor
) -> Tensor:
    return embedding(tokens, weight, position_weight=position_weight, order=order, dtype=like.dtype)


def _eager(
    tokens: Tensor, weight: Tensor, position_weight: Tensor, order: Tensor, like: Tensor
) -> Tensor:
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return (F.embedding(tokens, weight) + F.embedding(position, position_weight)).to(like.dtype)


EMBEDDING = Operator(
    name="embedding",
    sizes=("B", "T", "D", "V"),
    inputs=_inputs,
    ours=_ours,
    eager=_eager,
    cost=lambda B, T, D, V, itemsize: cost(B * T, D, V, itemsize),
    check_shape=lambda B, T, D, V: (min(B, 2), min(T, 257), D, min(V, 997)),
    shapes=SHAPES,
    small_shapes=((2, 64, 64, 4096), (1, 33, 48, 257)),
    tiny_shape=(1, 33, 48, 57),
    launch_shapes=SHAPES[:1],
    bound="bytes",
)
