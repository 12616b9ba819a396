"""The memory that a step needs, and the largest micro-batch that fits."""

import os
from typing import Any

import torch

from ...model import GPTConfig
from ...model.config import AdapterOptions
from ...model.cost import step_bytes
from ..choices import OPTIMIZERS

# Estimate: a CUDA context with the code and workspaces of libraries, or Python with PyTorch.
PROCESS_BYTES = 0.5e9
# Estimate: fraction of the memory for blocks that the allocator cannot use, and NCCL's buffers.
RESERVE = 0.10
# More tokens hardly make a step faster. On an H200, GPT-2 124M trains on 576,000 tokens per second
# with micro-batches of 32,768 tokens, and on 584,000 with 65,536 (bench/results/h200).
MAX_TOKENS = 65_536


def memory(
    model: GPTConfig,
    micro_batch: int,
    context_tokens: int,
    *,
    itemsize: int,
    accumulates: bool,
    recompute: str,
    optimizer: str,
    adapter: AdapterOptions | None = None,
) -> dict[str, float]:
    """Return the peak bytes during a step, by part.

    Args:
        itemsize: bytes per element of matmul operands.
        accumulates: whether a step has several micro-batches, or gradients stay in buckets.
        adapter: LoRA, or None.
    """
    parts = step_bytes(
        model,
        micro_batch,
        context_tokens,
        itemsize,
        accumulates=accumulates,
        recompute=recompute,
        block_matrix_state_bytes=OPTIMIZERS[optimizer].block_matrix_state_bytes,
        adapter=adapter,
    )
    return {**parts, "process": PROCESS_BYTES}


def fits(parts: dict[str, float], memory_bytes: int) -> bool:
    """Return whether the parts leave RESERVE of the memory free."""
    return sum(parts.values()) <= (1 - RESERVE) * memory_bytes


def host_bytes() -> int | None:
    """Return the memory of this machine; None on Windows, which does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return None


def device_bytes(device: torch.device, processes: int) -> int:
    """Return the memory that a run on `device` may use.

    Args:
        processes: processes of the run on this machine. They divide the memory of the host.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    # Without the size of the memory: a small laptop.
    return (host_bytes() or 8 * 2**30) // processes


def largest_micro_batch(
    model: GPTConfig, sequences: int, *, memory_bytes: int, itemsize: int, **options: Any
) -> int:
    """Return the largest micro-batch that fits and divides the sequences of a step. At least 1.

    It has at most MAX_TOKENS tokens.

    Args:
        sequences: per step, on each device.
        memory_bytes: of a device.
        itemsize, options: as for `memory`.
    """
    T = model.context_tokens
    for size in range(min(sequences, MAX_TOKENS // T), 1, -1):
        if sequences % size == 0:
            parts = memory(model, size, T, itemsize=itemsize, accumulates=True, **options)
            if fits(parts, memory_bytes):
                return size
    return 1
