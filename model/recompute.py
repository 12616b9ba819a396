"""Activation checkpointing: the backward computes activations again instead of keeping them.

The rows of RECOMPUTATIONS, the cheapest first, and what each computes again:

    none         nothing
    gelu         the output of GELU, in one pass over its input: gelu_mlp(recompute=True)
    selective    each block, except attention. Attention's output and log-sum-exp are kept, because
                 attention is the only layer whose cost per token grows with T
    block        each block; only its inputs are kept

Source     Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .attention import ATTENTIONS
from .config import GPTConfig

# The operators of all rows, whichever row is used: on a CPU, tritium's attention runs PyTorch's.
_ATTENTION_OPERATORS = tuple(name for row in ATTENTIONS.values() for name in row.operators)


@dataclass(frozen=True, kw_only=True)
class RecomputeRow:
    """A mode of activation checkpointing that the option `recompute` names."""

    run_block: Callable
    """run_block(block, *inputs) returns block(*inputs)."""
    dropped_bytes: Callable[[GPTConfig, int, int], int]
    """dropped_bytes(config, itemsize, block_bytes) returns the bytes per token that a block does
    not keep. block_bytes is what it keeps in mode none."""
    keeps_inputs: bool = False
    """Whether the inputs of each block are kept instead."""
    in_mlp: bool = False
    """Whether the MLP module computes its activation again: GPT sets its attribute `recompute`."""
    needs_mlp: str | None = None
    """The row of MLPS that the mode needs. None: any."""
    extra_matmul_forwards: int = 0
    """How many times the backward runs the forward matmuls of each block again."""
    extra_attention_forwards: int = 0
    """How many times the backward runs the forward of attention again."""

    def fits(self, config: GPTConfig) -> bool:
        """Return whether a model can use this mode."""
        return self.needs_mlp in (None, config.mlp)


def _run(block: Callable, *inputs):
    return block(*inputs)


def _checkpoint(block: Callable, *inputs, **options):
    # A block draws no random numbers, so their state need not be saved. Its dropout masks come
    # from seeds in its inputs.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_attention(_, operator: torch._ops.OpOverload, *args, **kwargs) -> CheckpointPolicy:
    if operator.name().startswith(_ATTENTION_OPERATORS):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_checkpoint_selective = functools.partial(
    _checkpoint,
    context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_attention),
)


def _attention_bytes(config: GPTConfig, itemsize: int) -> int:
    """The output and the float32 log-sum-exp of attention, per token."""
    return config.d_model * itemsize + 4 * config.n_head


RECOMPUTATIONS = {
    "none": RecomputeRow(run_block=_run, dropped_bytes=lambda config, itemsize, block: 0),
    "gelu": RecomputeRow(
        run_block=_run,
        dropped_bytes=lambda config, itemsize, block: config.d_feedforward * itemsize,
        in_mlp=True,
        needs_mlp="gelu",
    ),
    "selective": RecomputeRow(
        run_block=_checkpoint_selective,
        dropped_bytes=lambda config, itemsize, block: block - _attention_bytes(config, itemsize),
        keeps_inputs=True,
        extra_matmul_forwards=1,
    ),
    "block": RecomputeRow(
        run_block=_checkpoint,
        dropped_bytes=lambda config, itemsize, block: block,
        keeps_inputs=True,
        extra_matmul_forwards=1,
        extra_attention_forwards=1,
    ),
}


def check_recompute(name: str, config: GPTConfig) -> None:
    """Raise ValueError for an unknown mode, or for a mode that needs another MLP."""
    if name not in RECOMPUTATIONS:
        raise ValueError(f"recompute: expected {', '.join(RECOMPUTATIONS)}, got {name!r}")
    if not RECOMPUTATIONS[name].fits(config):
        *others, last = [mode for mode, row in RECOMPUTATIONS.items() if row.fits(config)]
        raise ValueError(
            f"recompute: {name} needs mlp {RECOMPUTATIONS[name].needs_mlp}, got {config.mlp}; "
            f"use {', '.join(others)} or {last}"
        )
