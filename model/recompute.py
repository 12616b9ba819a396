"""Activation checkpointing: what the backward computes again instead of keeping. Rows of one table.

    none         nothing
    gelu         the output of GELU, in one pass over its input: gelu_mlp(recompute=True)
    selective    blocks, except attention, whose output and log-sum-exp are kept: only attention's
                 matmuls grow with T
    block        whole blocks; only their inputs are kept

The rows are in order of cost: the cheapest first.

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

from .config import GPTConfig

# The forward operators of the rows of attention.ATTENTIONS, by the start of their names.
_ATTENTION_OPERATORS = (
    "tritium::causal_attention",
    "flash_attn::_flash_attn",
    "aten::_scaled_dot_product_flash",
    "aten::_scaled_dot_product_efficient",
    "aten::_scaled_dot_product_cudnn",
)


@dataclass(frozen=True, kw_only=True)
class RecomputeRow:
    """A mode of activation checkpointing that the option `recompute` names."""

    run_block: Callable
    """Calls run_block(block, *inputs)."""
    dropped_bytes: Callable[[GPTConfig, int, int], int]
    """Bytes per token and block that are not kept: (config, itemsize, bytes without this)."""
    keeps_inputs: bool = False
    """Whether the inputs of blocks are kept."""
    in_mlp: bool = False
    """Whether the MLP recomputes its activation itself."""
    needs_mlp: str | None = None
    """The only MLP that has this mode; None: all have."""
    extra_matmul_forwards: int = 0
    """How often the backward runs the matmuls of blocks again."""
    extra_attention_forwards: int = 0
    """How often the backward runs attention again."""

    def fits(self, config: GPTConfig) -> bool:
        """Return whether a model can use this mode."""
        return self.needs_mlp in (None, config.mlp)


def _run(block: Callable, *inputs):
    return block(*inputs)


def _checkpoint(block: Callable, *inputs, **options):
    # Blocks draw no random numbers.
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
    """Raise ValueError for an unknown mode, or a mode that the model's MLP does not have."""
    if name not in RECOMPUTATIONS:
        raise ValueError(f"recompute: expected {', '.join(RECOMPUTATIONS)}, got {name!r}")
    if not RECOMPUTATIONS[name].fits(config):
        fitting = [mode for mode, row in RECOMPUTATIONS.items() if row.fits(config)]
        raise ValueError(
            f"recompute: {name} needs an MLP with {RECOMPUTATIONS[name].needs_mlp}, "
            f"got {config.mlp!r}; use {', '.join(fitting)}"
        )
