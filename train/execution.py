"""Choose how a run executes, once, from its configuration and the launch.

All code of a training run reads the device, dtype, engine and micro-batch from an Execution.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..kernels.core.triton import HAS_TRITON
from ..model.choices import choose_attention
from ..model.lora import check_adapter
from .choices import ENGINES, check_optimizer
from .config import TrainConfig
from .data.tokenizers.tokenizer import vocab_size_of
from .distributed.engines import SingleProcess
from .distributed.world import SINGLE_PROCESS, World
from .machine.memory import device_bytes, largest_micro_batch
from .precision import choose_dtype
from .tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The ranks, device, precision and sizes with which a run executes."""

    world: World
    device: torch.device
    """Device of this rank."""
    dtype: torch.dtype
    """Dtype of matmuls and of the residual stream. Weights and optimizer state are float32."""
    is_compiled: bool
    """Whether torch.compile compiles the model."""
    micro_batch: int
    """Sequences per forward and backward on this rank."""
    cuda_graph: bool = False
    """Whether micro-batches and the optimizer's update are recorded as CUDA graphs."""

    def summary(self) -> dict[str, Any]:
        """Return what the run's history compares: results of two summaries agree to rounding."""
        return {
            "device": self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
            "compile": self.is_compiled,
            "micro_batch_size": self.micro_batch,
            "ranks": self.world.size,
            "parallel": self.world.engine,
            "shard_ranks": self.world.shard_ranks,
            "tensor_parallel": self.world.tensor_ranks,
        }

    @property
    def engine(self) -> type[SingleProcess]:
        """How the ranks share the model."""
        return ENGINES[self.world.engine].engine


def resolve(config: TrainConfig, world: World = SINGLE_PROCESS) -> Execution:
    """Choose everything that "auto" leaves open. Ranks do not communicate here.

    Raises: InputError unless the configuration, the machine and the ranks fit together.
    """
    device = world.device(config.execution.device)
    dtype = choose_dtype(config.execution.precision, device)
    execution = Execution(
        world=world,
        device=device,
        dtype=dtype,
        is_compiled={"on": True, "off": False, "auto": compiles_on(device)}[
            config.execution.compile
        ],
        micro_batch=_micro_batch(config, world, device, dtype),
        cuda_graph=_uses_cuda_graph(config, device, ENGINES[world.engine].engine),
    )
    check_attention(config.execution.attention, device, dtype)
    check_optimizer(config.optimizer, world.tensor_ranks)
    _check_adapter(config, world)
    execution.engine.check(config.gpt(vocab_size=1), execution)
    return execution


def _check_adapter(config: TrainConfig, world: World) -> None:
    """Raise InputError if LoRA or prefix tuning does not fit the other options."""
    check_adapter(config.adapter, config.model, config.execution.recompute)
    names = {"lora": config.adapter.lora, "prefix_tokens": config.model.prefix_tokens}
    for name in (name for name, value in names.items() if value):
        if config.init_from is None:
            raise InputError(
                f"{name}: expected a trained model to start from, got none; name it with "
                "`init_from`"
            )
        if world.tensor_ranks > 1:
            raise InputError(
                f"{name}: expected 1 tensor rank, got {world.tensor_ranks}; set "
                "`tensor_parallel` to 1"
            )
    if not config.model.prefix_tokens:
        return
    if config.adapter.lora:
        raise InputError("prefix_tokens: expected no LoRA with a prefix, got both; leave one out")
    if config.document_mask or getattr(config.task_options, "packing", False):
        option = "document_mask" if config.document_mask else "packing"
        raise InputError(
            f"prefix_tokens: expected rows of one document, got packed ones; turn `{option}` off"
        )


def compiles_on(device: torch.device) -> bool:
    """Return whether runs on `device` are compiled by default: on CUDA, if Triton is installed."""
    return device.type == "cuda" and HAS_TRITON


def _uses_cuda_graph(
    config: TrainConfig, device: torch.device, engine: type[SingleProcess]
) -> bool:
    """Return whether the steps are recorded as CUDA graphs."""
    task = TASKS[config.task]
    obstacles = {
        "the device is not an NVIDIA GPU": device.type != "cuda" or torch.version.cuda is None,
        "the number of documents varies with document_mask": config.document_mask,
        f"the number of packed records varies in the task {config.task}": task.has_documents,
        "fsdp communicates in each micro-batch": not engine.can_use_cuda_graph,
    }
    found = [reason for reason, applies in obstacles.items() if applies]
    if config.execution.cuda_graph == "on" and found:
        raise InputError(f"cuda_graph: expected auto or off, got on, but {found[0]}")
    return config.execution.cuda_graph != "off" and not found


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError if the attention is not installed or does not support device and dtype."""
    try:
        row = choose_attention(name)
    except ValueError as error:
        raise InputError(str(error)) from None
    if row.needs_16_bit_cuda and not (device.type == "cuda" and dtype.itemsize == 2):
        raise InputError(
            f"attention: expected a GPU and 16 bits for flash-attn, got {device.type} and {dtype}; "
            "use tritium or sdpa"
        )


def _micro_batch(
    config: TrainConfig, world: World, device: torch.device, dtype: torch.dtype
) -> int:
    """Return the sequences per forward on each rank."""
    data_ranks = world.data_ranks
    per_rank, rest = divmod(config.batch_size, data_ranks)
    micro_batch = config.execution.micro_batch_size
    if micro_batch == "auto" and not rest:
        return largest_micro_batch(
            config.gpt(_likely_vocab_size(config)),
            per_rank,
            memory_bytes=device_bytes(device, world.local_size),
            itemsize=dtype.itemsize,
            recompute=config.execution.recompute,
            optimizer=config.optimizer,
            adapter=config.adapter,
        )
    if micro_batch in (None, "auto"):
        micro_batch = per_rank
        divisor = f"{data_ranks} ranks"
    else:
        divisor = f"{data_ranks} ranks times micro-batches of {micro_batch}"
    if rest or per_rank == 0 or per_rank % micro_batch:
        raise InputError(f"batch_size: expected a multiple of {divisor}, got {config.batch_size}")
    return micro_batch


def _likely_vocab_size(config: TrainConfig) -> int:
    """Return the vocabulary of the tokenizer if its name tells, else GPT-2's."""
    try:
        return vocab_size_of(config.tokenizer or "gpt2")
    except ValueError:
        return vocab_size_of("gpt2")
