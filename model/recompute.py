"""Activation checkpointing: the backward computes activations again instead of keeping them.

The rows of RECOMPUTATIONS in choices.py, the cheapest first, and what each computes again:

    none         nothing
    gelu         the output of GELU, in one pass over its input: gelu_mlp(recompute=True)
    selective    each block, except attention. Attention's output and log-sum-exp are kept, because
                 attention is the only layer whose cost per token grows with T
    block        each block; only its inputs are kept

Source     Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198
"""

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .choices import ATTENTIONS

# The operators of all rows, whichever row is used: on a CPU, tritium's attention runs PyTorch's.
_ATTENTION_OPERATORS = tuple(name for row in ATTENTIONS.values() for name in row.operators)


def run_block(block: Callable, *inputs):
    """Return block(*inputs). Its backward computes nothing again."""
    return block(*inputs)


def checkpoint_block(block: Callable, *inputs, **options):
    """Return block(*inputs). Its backward computes the block again."""
    # A block draws no random numbers, so their state need not be saved. Its dropout masks come
    # from seeds in its inputs.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_attention(_, operator: torch._ops.OpOverload, *args, **kwargs) -> CheckpointPolicy:
    if operator.name().startswith(_ATTENTION_OPERATORS):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


checkpoint_except_attention = functools.partial(
    checkpoint_block,
    context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_attention),
)
