"""Estimate, before a run, whether it fits into memory and how long a step takes.

Memory     machine/memory.py: model/cost.step_bytes, which tests compare with measured peaks, plus
           PROCESS_BYTES, must leave RESERVE of the memory free. Matmuls are bfloat16 on CUDA and
           float32 on a CPU. The formulas describe the reference implementations. The Triton kernels
           need less, except for the logits of the head: there the formula uses the larger of the
           two. Each GPU holds all weights, gradients and optimizer state.

Step time  a range: the time at good rates and the time at poor rates. A rate is a fraction of a
           device's limit. Seconds on one GPU, for n tokens in m micro-batches; the model has P
           parameters, and N without those that are only looked up:
    matmuls       6 N n / (rate x bf16 peak); plus 2 n per weight of the blocks for each
                  time that activation checkpointing recomputes them
                  LoRA: 4 N n, plus 6 n per weight of LoRA, and P is the number of LoRA's weights
                  prefix: 4 N n, and P is the number of its weights
    attention     7 L D S n / (rate x bf16 peak): 2 matmuls forward and 5 backward, each 2 D S
                  FLOPs over the visible half; plus 2 L D S n for each recomputation. S = T, or
                  less with a window: see model/cost.py
    activations   n (L D bytes + V bytes of logits) / (rate x memory bandwidth)
    parameters    (P + weights of blocks + m (weights of blocks, embedding and head)) bytes / (rate
                  x memory bandwidth), with AdamW's update for all optimizers
    all-reduce    2 (g - 1) / g 4 P bytes / (rate x one direction of the link): a float32 ring over
                  the g GPUs of a node. At good rates it overlaps the other terms; at poor rates
                  it is added to them
           Launches, data and evaluations are not included. `Plan.is_launch_bound` tells whether
           launches may take longer than the rest.

Source     rates: public measurements, next to each constant. Tests compare the range with llm.c's
           scripts and modded-nanogpt's first record.
"""

import math
import platform
import re
from dataclasses import dataclass, field, replace

import torch

from ..errors import InputError, check_positive, unknown_name
from ..model.choices import RECOMPUTATIONS
from ..model.config import AdapterOptions, GPTConfig
from ..model.cost import (
    adapter_elements,
    attended_keys,
    matmul_parameters,
    matrices,
    parameters,
)
from ..model.lora import check_adapter, lora_parameters
from .data.tokenizers.tokenizer import vocab_size_of
from .distributed.world import World
from .execution import resolve
from .finetune.start import with_prefix
from .machine.gpus import CEILINGS, Ceiling, ceiling
from .machine.memory import fits, host_bytes, memory
from .machine.options import PlanOptions
from .recipes import recipe
from .run.folder import RunRecord

# Rates are (poor, good) fractions of a device's limit. Other generations get DEFAULT_GENERATION's.
# Large bf16 matmuls. A100: 230 to 270 of 312 TFLOP/s (ml-engineering's highest is 271). H100: 600
# to 750 of 989 (highest 794).
MATMUL_RATES = {"ampere": (230 / 312, 270 / 312), "hopper": (600 / 989.4, 750 / 989.4)}
# Causal attention, forward and backward, heads of 64, T = 1024. A100: FlashAttention's first Triton
# kernel 75 TFLOP/s, FlashAttention-2 119. H100: FlashAttention-2 192; good is 400, about the
# forward of cuDNN and FlashAttention-3 (373 to 392).
_ATTENTION_RATES = {"ampere": (75 / 312, 119 / 312), "hopper": (192 / 989.4, 400 / 989.4)}
DEFAULT_GENERATION = "hopper"
# torch.clone reaches 0.90 on an H100. Kernels that also compute reach less.
_BANDWIDTH_RATES = (0.75, 0.90)
# NCCL's all-reduce on eight A100: about 230 of 300 GB/s per direction.
_LINK_RATES = (0.75, 0.90)

# Bytes that a layer reads and writes per token and element of D, forward + backward, in bf16.
# Poor: additions and norms separate (10 + 12), GELU (8 + 12), bias gradients (9), attention
# (4 + 8), q, k, v split and transposed (8 + 8). Good: additions fused with norms (8 + 8), attention
# (4 + 8), the rest fused into matmuls.
_LAYER_BYTES = (2 * (22 + 20 + 9 + 12 + 16), 2 * (16 + 12))
# Bytes per logit, bf16. Poor: written, read by the softmax, gradient written and read. Good: none,
# because chunks stay in cache.
_LOGIT_BYTES = (8, 0)
# Bytes per parameter and step. AdamW reads and writes weight and two moments and reads the
# gradient, all float32: 28. Poor: clipping is a pass of its own, 12 more.
_STEP_BYTES = (28 + 12, 28)
# Bytes per weight of a block: cast to bf16, per step; add its bf16 gradient to a float32 sum, per
# micro-batch.
_CAST_BYTES = 6
_ACCUMULATE_BYTES = 10
# Bytes per weight of the head, per micro-batch: cast the weight, scale its float32 gradient, add
# the gradient.
_HEAD_BYTES = 6 + 8 + 12
# Bytes per weight of an untied embedding, per micro-batch: write its gradient, add it.
_LOOKUP_BYTES = 4 + 12
# Rough numbers, only used to tell whether a step is launch-bound.
_KERNELS_PER_LAYER = 40  # forward + backward
_LAUNCH_SECONDS = 5e-6

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a run is planned for."""

    name: str
    gpus: int
    memory_bytes: int
    """Memory per GPU."""
    itemsize: int
    """Bytes per element of matmul operands."""
    ceiling: Ceiling | None
    """The limits of the GPU, if known."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a run on a machine. The methods estimate memory and time."""

    model: GPTConfig
    machine: Machine
    sequences: int
    """Sequences per step, on each GPU."""
    micro_batch: int
    """Sequences per forward and backward, on each GPU."""
    context_tokens: int
    tokens: int
    """Tokens to train on."""
    recompute: str = "none"
    optimizer: str = "adamw"
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    """LoRA. Rank 0: all weights are trained."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step, over all GPUs."""
        return self.sequences * self.machine.gpus * self.context_tokens

    def memory(self, micro_batch: int) -> dict[str, float]:
        """Return the peak bytes on each GPU during a step, by part."""
        # With several GPUs, gradients stay in the buckets that reduce them.
        accumulates = micro_batch < self.sequences or self.machine.gpus > 1
        return memory(
            self.model,
            micro_batch,
            self.context_tokens,
            itemsize=self.machine.itemsize,
            accumulates=accumulates,
            recompute=self.recompute,
            optimizer=self.optimizer,
            adapter=self.adapter,
        )

    def fits(self, micro_batch: int) -> bool:
        """Return whether that many sequences leave RESERVE of the memory free."""
        return fits(self.memory(micro_batch), self.machine.memory_bytes)

    def largest_micro_batch(self) -> int:
        """Return the largest micro-batch that fits, up to all sequences of a step. 0: none fits."""
        if self.fits(self.sequences):
            return self.sequences
        fitting = 0
        too_many = self.sequences
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if self.fits(middle):
                fitting = middle
            else:
                too_many = middle
        return fitting

    def seconds(self) -> tuple[float, float] | None:
        """Return the seconds per step at good and at poor rates; None if the limits are unknown."""
        known = self.machine.ceiling
        return None if known is None else (_seconds(self, known, 1), _seconds(self, known, 0))

    def is_launch_bound(self) -> bool:
        """Return whether kernel launches may take longer than the kernels."""
        seconds = self.seconds()
        launches = self.model.n_layer * _KERNELS_PER_LAYER * (self.sequences // self.micro_batch)
        return seconds is not None and seconds[0] < launches * _LAUNCH_SECONDS


def _seconds(plan: Plan, known: Ceiling, quality: int) -> float:
    """Seconds per step at poor (quality 0) or good (1) rates; terms as at the top of this file."""
    model = plan.model
    gpus = plan.machine.gpus
    lora = lora_parameters(model, plan.adapter)
    adapter = adapter_elements(model, plan.adapter)  # with a prefix
    P = adapter or parameters(model)  # trained
    L = model.n_layer
    D = model.d_model
    n = plan.sequences * plan.context_tokens
    micro_batches = plan.sequences // plan.micro_batch
    matmul_flops = rates(MATMUL_RATES, known)[quality] * known.bf16_flops
    attention_flops = rates(_ATTENTION_RATES, known)[quality] * known.bf16_flops
    bandwidth = _BANDWIDTH_RATES[quality] * known.bytes_per_second
    link = _LINK_RATES[quality] * known.link_bytes_per_second / 2

    # compute
    row = RECOMPUTATIONS[plan.recompute]
    per_weight = 4 if adapter else 6  # frozen weights have no gradient
    matmuls = per_weight * matmul_parameters(model) + 6 * lora
    matmuls += 2 * row.extra_matmul_forwards * matrices(model)
    keys = attended_keys(model, plan.context_tokens)
    attention = (7 + 2 * row.extra_attention_forwards) * L * D * keys
    compute = n * matmuls / matmul_flops + n * attention / attention_flops

    # memory traffic
    activations = n * (L * D * _LAYER_BYTES[quality] + model.vocab_size * _LOGIT_BYTES[quality])
    cast = lora if adapter else matrices(model)
    update = P * _STEP_BYTES[quality] + cast * _CAST_BYTES
    table_bytes = _HEAD_BYTES + (0 if model.tied_head else _LOOKUP_BYTES)
    if adapter:
        table_bytes = _CAST_BYTES
    accumulate = cast * _ACCUMULATE_BYTES + model.vocab_size * D * table_bytes
    traffic = (activations + update + micro_batches * accumulate) / bandwidth

    all_reduce = 2 * (gpus - 1) / gpus * 4 * P / link
    single = compute + traffic
    return max(single, all_reduce) if quality else single + all_reduce


def rates(table: dict[str, tuple[float, float]], known: Ceiling) -> tuple[float, float]:
    """Return the (poor, good) rates of a GPU's generation, or of DEFAULT_GENERATION."""
    return table.get(known.generation, table[DEFAULT_GENERATION])


# --- from options, or from a run


def make_plan(options: PlanOptions) -> Plan:
    """Make a plan from options.

    Raises: InputError, naming the option, for unknown names, values out of range, and sizes that
        do not divide.
    """
    config = recipe(options.recipe)
    check_positive(options, "gpus", "micro_batch_size", "context_tokens")
    context = options.context_tokens or config.model.context_tokens
    recompute = options.recompute or config.execution.recompute
    config = config.with_options(context_tokens=context, recompute=recompute)
    adapter = AdapterOptions(lora=options.lora, lora_targets=options.lora_targets)
    check_adapter(adapter, config.model, recompute)
    if options.lora and options.prefix_tokens:
        raise InputError("prefix_tokens: expected no LoRA with a prefix, got both; leave one out")
    # The prefix takes the place of tokens.
    model = with_prefix(config.gpt(vocab_size_of(config.tokenizer)), options.prefix_tokens)
    T = model.context_tokens
    machine = _machine(options.gpu, options.gpus)

    step = count_tokens("tokens_per_step", options.tokens_per_step) or config.batch_size * T
    sequences, rest = divmod(step, T * machine.gpus)
    if rest:
        raise InputError(
            f"tokens_per_step: expected a multiple of {machine.gpus} GPUs x {T} tokens, got "
            f"{step}; take {(sequences + 1) * T * machine.gpus}"
        )
    micro_batch = options.micro_batch_size or math.gcd(config.micro_batch, sequences)
    if sequences % micro_batch:
        raise InputError(
            f"micro_batch_size: expected a divisor of the {sequences} sequences per step on each "
            f"GPU, got {micro_batch}; take {largest_divisor(sequences, micro_batch)}"
        )
    return Plan(
        model=model,
        machine=machine,
        sequences=sequences,
        micro_batch=micro_batch,
        context_tokens=T,
        tokens=count_tokens("tokens", options.tokens) or config.steps * step,
        recompute=recompute,
        optimizer=config.optimizer,
        adapter=adapter,
    )


def plan_of_run(record: RunRecord, world: World) -> Plan:
    """Make the plan of a run on this machine."""
    config = record.train
    execution = resolve(config, world)
    on_cuda = execution.device.type == "cuda"
    machine = _machine(None, 1) if on_cuda else _cpu_machine(world.local_size)
    return Plan(
        model=record.model,
        machine=replace(machine, gpus=world.data_ranks, itemsize=execution.dtype.itemsize),
        sequences=config.batch_size // world.data_ranks,
        micro_batch=execution.micro_batch,
        context_tokens=config.model.context_tokens,
        tokens=config.steps * config.batch_size * config.model.context_tokens,
        recompute=config.execution.recompute,
        optimizer=config.optimizer,
        adapter=config.adapter,
    )


def _machine(gpu: str | None, gpus: int) -> Machine:
    if gpu is not None:
        name = gpu.lower()
        if name not in CEILINGS:
            raise InputError(unknown_name("GPU", gpu, CEILINGS))
        known = CEILINGS[name]
        memory = int(known.memory_bytes)
        return Machine(name=name, gpus=gpus, memory_bytes=memory, itemsize=2, ceiling=known)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory
        return Machine(name=name, gpus=gpus, memory_bytes=memory, itemsize=2, ceiling=ceiling(name))
    if gpus > 1:
        raise InputError(
            f"gpus: expected 1 on a machine without a GPU, got {gpus}; name a GPU with `gpu`"
        )
    return _cpu_machine()


def _cpu_machine(processes: int = 1) -> Machine:
    """This machine's CPU, with one process's fraction of the memory."""
    total = host_bytes()
    if total is None:
        raise InputError(
            "gpu: expected the name of a GPU, because the memory of this machine is not known, "
            "got none; name one, such as h100"
        )
    name = f"this {platform.machine()} CPU"
    return Machine(name=name, gpus=1, memory_bytes=total // processes, itemsize=4, ceiling=None)


def count_tokens(option: str, text: str | None) -> int | None:
    """Parse a number of tokens such as 10B."""
    if text is None:
        return None
    plain = text.strip().lower().replace(",", "").replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d{1,2})?)([kmbt]?)", plain)
    count = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise InputError(
            f"{option}: expected a number of tokens such as 10B, 500M, 1.5e9 or 524288, "
            f"got {text!r}"
        )
    return count


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
