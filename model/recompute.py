"""What the backward computes again instead of keeping it: rows of one table, chosen by name, the dearer the less is kept.

    none         nothing
    gelu         GELU's output, one pass over its input: gelu_mlp(recompute=True)
    selective    blocks, but for attention, whose o and lse are kept: its products, and no others, grow with T
    block        blocks; their inputs are kept

cost.activation_bytes has the bytes of each.

Source     Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, for selective
"""

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .config import GPTConfig

# The forwards of what attention.ATTENTIONS has, by the beginning of their names.
_ATTENTION = (
    *("tritium::causal_attention", "flash_attn::_flash_attn"),
    *(f"aten::_scaled_dot_product_{backend}" for backend in ("flash", "efficient", "cudnn")),
)


def _plain(block: Callable, *inputs):
    return block(*inputs)


def _checkpointed(block: Callable, *inputs, **options):
    # Nothing in a block draws random numbers.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_attention(_, operator: torch._ops.OpOverload, *args, **kwargs) -> CheckpointPolicy:
    keeps = operator.name().startswith(_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTATIONS = {
    "none": _plain,
    "gelu": _plain,
    "selective": functools.partial(
        _checkpointed,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_attention),
    ),
    "block": _checkpointed,
}


def check_recompute(name: str, config: GPTConfig) -> None:
    """Raises: ValueError if there is none of that name, or gelu is to be recomputed where there is none."""
    if name not in RECOMPUTATIONS:
        raise ValueError(f"recompute: expected {', '.join(RECOMPUTATIONS)}, got {name!r}")
    if name == "gelu" and config.mlp != "gelu":
        raise ValueError(
            f"recompute: gelu needs an MLP with GELU, got {config.mlp!r}; take none, selective or block"
        )
