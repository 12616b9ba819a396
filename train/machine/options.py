"""Options of commands that are not options of a run: a TrainConfig does not have them."""

from dataclasses import dataclass
from typing import Literal

from ...model.choices import RECOMPUTATIONS
from ..choices import ENGINES, PRECISIONS

_PARALLEL = tuple(name for name, row in ENGINES.items() if row.is_parallel)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the processes of torchrun divide the work. A resumed run may change this."""

    parallel: Literal[("auto", *_PARALLEL)] = "auto"
    """ddp splits batches, zero1 also optimizers, fsdp also weights. auto: ddp; fsdp if needed."""
    shard_ranks: int | None = None
    """fsdp: number of ranks that hold one copy of the weights together. None: all ranks."""
    tensor_parallel: int = 1
    """fsdp: number of neighbouring ranks that compute each layer together."""
    sharded_checkpoints: Literal["auto", "on", "off"] = "auto"
    """fsdp: each rank writes its part of a checkpoint. auto: from 2 billion parameters on."""
    rank_timeout: float = 25.0
    """Seconds without progress, after the first step, until a rank counts as hung. 0: never."""


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """Tokenizer, device and precision of the model that a command opens."""

    tokenizer: str | None = None
    """Tokenizer, if the model has none: bytes, gpt2, FILE.tiktoken, FILE.json or FOLDER."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ... auto: CUDA if there is a GPU, otherwise the CPU."""
    precision: Literal[tuple(PRECISIONS)] = "auto"
    """Dtype of matmuls. auto: float32 on a CPU, on CUDA bfloat16, or float16 on old GPUs."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The run and the machine to plan for. None: as in the recipe, or this machine."""

    recipe: str
    """Recipe to plan for."""
    gpu: str | None = None
    """GPU to plan for, such as h100, a100-80gb or rtx-4090. None: this machine's."""
    gpus: int = 1
    """Number of GPUs, in one node."""
    tokens: str | None = None
    """Tokens to train on: 10B, 500M, 1.5e9, ... None: the recipe's steps."""
    tokens_per_step: str | None = None
    """Tokens per optimizer step, over all GPUs. None: the recipe's batch."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward on each GPU. None: the recipe's."""
    context_tokens: int | None = None
    """Tokens per sequence. None: the recipe's."""
    recompute: Literal[tuple(RECOMPUTATIONS)] | None = None
    """Activation checkpointing. None: the recipe's."""
    lora: int = 0
    """Rank of LoRA. 0: train all weights."""
    lora_targets: tuple[str, ...] = ()
    """Layers with LoRA, such as c_attn. Default: all linear layers of blocks."""
    prefix_tokens: int = 0
    """Learned prefix tokens in front of each sequence. 0: train all weights."""
