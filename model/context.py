"""The inputs that all layers of a forward pass share, and the branch that a layer returns.

Shapes     B sequences, T tokens, D = d_model
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import TRITIUM, AttentionFunctions
from .generation import KVCache, Prefill

# Inputs of linear layers per block that the dropout of LoRA can change.
ADAPTER_SITES = 4


class ForwardContext(NamedTuple):
    """Inputs of a forward pass that all blocks share.

    Args:
        sizes: (B, T).
        cu_seqlens: where packed documents begin, or None.
        rope: cosines and sines of RoPE, or None.
        cache: keys and values of earlier tokens, or None.
        attention: the implementation of attention.
        dropout: probability of dropping an element of a branch.
        attention_dropout: probability of dropping an attention weight.
        seeds: of the dropout masks, as dropout_seeds returns them. None: nothing is dropped.
        adapter_seeds: of the dropout of LoRA, as adapter_seeds returns them, or None.
        prefix: the parameter of prefix.py if keys and values of the prefix are not in the cache.
    """

    sizes: tuple[int, int]
    cu_seqlens: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None
    cache: KVCache | Prefill | None = None
    attention: AttentionFunctions = TRITIUM
    dropout: float = 0.0
    attention_dropout: float = 0.0
    seeds: Tensor | None = None
    adapter_seeds: Tensor | None = None
    prefix: Tensor | None = None

    def branch_dropout(self, site: int) -> tuple[float, Tensor | None]:
        """Return probability and seed of the mask of a branch. See dropout_seeds for `site`."""
        return (0.0, None) if self.seeds is None else (self.dropout, self.seeds[site, 0])

    def adapter_seeds_of(self, layer: int) -> tuple[Tensor | None, ...]:
        """Return the ADAPTER_SITES seeds of a layer, each None if nothing is dropped."""
        if self.adapter_seeds is None:
            return (None,) * ADAPTER_SITES
        first = ADAPTER_SITES * layer
        return tuple(self.adapter_seeds[first + site, 0] for site in range(ADAPTER_SITES))


def dropout_seeds(seed: Tensor, n_layer: int) -> Tensor:
    """Return the seeds of all dropout masks of a forward, (3 n_layer + 1, 2) int64.

    Row 0: the embedding. Row 3 l + 1: the attention weights of layer l. Row 3 l + 2: the output of
    its attention. Row 3 l + 3: the output of its MLP.

    Column 1 is padding: it aligns each seed to 16 bytes. Triton would compile a second kernel for
    an unaligned seed.
    """
    return _rows_of_seeds(seed, 0, 3 * n_layer + 1)


def adapter_seeds(seed: Tensor, n_layer: int) -> Tensor:
    """Return the seeds of the dropout of LoRA, (ADAPTER_SITES n_layer, 2) int64.

    The rows of a layer: the inputs of c_attn, of attention's c_proj, of the first layers of the
    MLP, and of its c_proj. They continue the rows of dropout_seeds, which has the same columns.
    """
    return _rows_of_seeds(seed, 3 * n_layer + 1, ADAPTER_SITES * n_layer)


def _rows_of_seeds(seed: Tensor, first: int, count: int) -> Tensor:
    # The rows are 2^40 apart, so that forwards with the seeds 0, 1, 2 ... share no mask.
    rows = torch.arange(first, first + count, device=seed.device)
    return (seed + (rows << 40)).unsqueeze(1).repeat(1, 2)


class Branch(NamedTuple):
    """The output of attention or of an MLP, which the next norm adds to the residual stream.

    Args:
        y: (B T, D).
        added_bias: (D,), the bias that is already part of y, or None. The bias was added
            without a gradient. The next norm computes the bias's gradient, because its backward
            has the gradient of y in registers.
    """

    y: Tensor
    added_bias: Tensor | None
