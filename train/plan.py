"""What a run needs, before it is started: does it fit, how long does it take, what does it cost. `tritium plan`

Memory     the fullest moment of a step by model/cost.step_bytes, which tests hold to measured peaks, and PROCESS_BYTES; RESERVE
           of the memory has to stay free. On CUDA products are bfloat16 (itemsize 2), on a CPU float32. The formulas follow the
           references; fused kernels hold less, but for the head's logits, where the larger counts. Every GPU has all weights,
           gradients and optimizer state: nothing is sharded

Step time  a range: everything at a good rate at once, and everything at a poor one. Seconds of one GPU for n tokens in
           m micro-batches, in a model of N parameters, without positions, and P with them:
    products      6 N n / (share of the bf16 peak); where blocks are recomputed, the 2 n of their matrices once more
    attention     7 L D T n / (share of the bf16 peak): 2 products forward, 5 backward, 2 D T FLOPs each, over the visible half;
                  9 where all of a block is recomputed
    activations   n (L D bytes + V bytes of logits) / (share of the memory's bandwidth)
    parameters    (P + blocks' matrices + m (blocks' matrices + head)) bytes / (share of the memory's bandwidth)
    all-reduce    2 (g - 1) / g 4 P bytes / (share of one direction of the link): a ring over g GPUs of one node, float32.
                  At best it is hidden behind the rest, at worst it is added
           Launches, data and evaluations are left out; where launches would take longer than the rest, the answer says so.
MFU        counts 6 N + 12 L D T FLOPs a token (model/cost.flops_per_token), as everybody reports it

Source     rates: public measurements, beside each constant; anchors: llm.c's scripts and modded-nanogpt's first record
"""

import itertools
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro

from ..errors import InputError
from ..kernels.core.device import CEILINGS, Ceiling, ceiling
from ..model import PRESETS, GPTConfig
from ..model.cost import flops_per_token, matrices, parameters, positions, step_bytes
from ..model.recompute import RECOMPUTATIONS
from .commands.cli import near, parse
from .config import TrainConfig
from .data.tokenizer import vocab_size_of
from .distributed.world import World
from .execution import resolve
from .recipes import RECIPES, recipe
from .run.folder import RunRecord

# A CUDA context with the libraries' code and workspaces, or Python with PyTorch on a CPU: about half a gigabyte. An estimate.
PROCESS_BYTES = 0.5e9
# Share of the memory that has to stay free: blocks the allocator cannot use, NCCL's buffers. An estimate.
RESERVE = 0.10

# Shares of a ceiling, (poor, good). A generation without a row is taken as _DEFAULT, and the answer says so.
# Large bf16 products: A100 230 to 270 of 312 TFLOP/s (ml-engineering's most: 271), H100 600 to 750 of 989 (most: 794).
_PRODUCTS = {"ampere": (230 / 312, 270 / 312), "hopper": (600 / 989.4, 750 / 989.4)}
# Forward and backward, causal, heads of 64, T = 1024. A100: FlashAttention's old Triton kernel 75, FlashAttention-2 119. H100:
# FlashAttention-2 192; good: 400, about what cuDNN and FlashAttention-3 reach forward (373 to 392).
_ATTENTION = {"ampere": (75 / 312, 119 / 312), "hopper": (192 / 989.4, 400 / 989.4)}
_DEFAULT = "hopper"
# torch.clone reaches 0.90 on an H100; kernels that also compute on the way, less.
_BANDWIDTH = (0.75, 0.90)
# NCCL's all-reduce on eight A100: about 230 of 300 GB/s a direction.
_LINK = (0.75, 0.90)

# Tensors of D bf16 numbers that a layer reads or writes for each token, forward + backward. Good: additions fused with norms
# (8 + 8) and attention (4 + 8), all else in the products' epilogues. Poor: additions and norms apart (10 + 12), GELU (8 + 12),
# bias gradients (9), attention (4 + 8), and q, k, v cut apart and transposed (8 + 8).
_LAYER_BYTES = (2 * (22 + 20 + 9 + 12 + 16), 2 * (16 + 12))
# Of each logit: bf16, written, read by the softmax, its gradient written and read; none in chunks that stay in cache.
_LOGIT_BYTES = (8, 0)
# AdamW reads and writes weight and two moments and reads the gradient, all float32: 28; clipping as a pass of its own: 12.
_STEP_BYTES = (28 + 12, 28)
# Of each weight in a block: cast to bf16 once a step; its bf16 gradient added to the float32 sum in each micro-batch.
_CAST_BYTES, _SUM_BYTES = 6, 10
# Of the head's, which is the embedding's, in each micro-batch: cast, its gradient widened, then added.
_HEAD_BYTES = 6 + 6 + 12
# Kernels a layer in forward and backward, and seconds that PyTorch takes to launch one: about, only to tell what they bound.
_KERNELS_A_LAYER, _LAUNCH_SECONDS = 40, 5e-6

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `tritium plan`."""

    recipe: tyro.conf.Positional[str]
    """Recipe to plan for. gpt2, gpt2-medium, gpt2-large and gpt2-xl: with the published vocabulary of 50,257."""
    gpu: str | None = None
    """h100, a100-80gb, rtx-4090 ...; default: this machine's."""
    gpus: int = 1
    """How many, in one node."""
    tokens: str | None = None
    """To train on: 10B, 500M, 1.5e9 ...; default: the recipe's steps."""
    price: float | None = None
    """Of a GPU for an hour, in any currency."""
    tokens_per_step: str | None = None
    """Tokens of an optimizer step over all GPUs; default: the recipe's batch."""
    micro_batch_size: int | None = None
    """Sequences at once on a GPU; default: the recipe's."""
    context_tokens: int | None = None
    """Tokens a sequence; default: the recipe's."""
    recompute: Literal["none", "gelu", "selective", "block"] | None = None
    """What the backward computes again; default: the recipe's."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for. `ceiling` is None where nothing is known of its speed, `itemsize` the bytes of a product."""

    name: str
    gpus: int
    memory_bytes: int
    itemsize: int
    ceiling: Ceiling | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's sizes on a machine, and what follows from them."""

    model: GPTConfig
    machine: Machine
    sequences: int
    """Of a step, on each GPU."""
    micro_batch: int
    context_tokens: int
    tokens: int
    """To train on."""
    recompute: str = "none"

    @property
    def tokens_per_step(self) -> int:
        """Over all GPUs."""
        return self.sequences * self.machine.gpus * self.context_tokens

    def memory(self, micro_batch: int) -> dict[str, float]:
        """Bytes on each GPU by part with that many sequences at once."""
        # With several GPUs the gradients stay where they are reduced.
        accumulates = micro_batch < self.sequences or self.machine.gpus > 1
        sizes = (self.model, micro_batch, self.context_tokens, self.machine.itemsize)
        parts = step_bytes(*sizes, accumulates=accumulates, recompute=self.recompute)
        return {**parts, "process": PROCESS_BYTES}

    def fits(self, micro_batch: int) -> bool:
        """Whether that many sequences at once leave RESERVE of the memory free."""
        return sum(self.memory(micro_batch).values()) <= (1 - RESERVE) * self.machine.memory_bytes

    def largest_micro_batch(self) -> int:
        """Most sequences of a step that fit at once; 0 if not even one does."""
        if self.fits(self.sequences):
            return self.sequences
        fitting, too_many = 0, self.sequences
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            fitting, too_many = (middle, too_many) if self.fits(middle) else (fitting, middle)
        return fitting

    def seconds(self) -> tuple[float, float] | None:
        """Of a step at good rates and at poor ones; None where no ceilings are known."""
        known = self.machine.ceiling
        if known is None:
            return None
        poor, good = (_seconds(self, known, end) for end in (0, 1))
        return good, poor

    def is_launch_bound(self) -> bool:
        """Whether launching a micro-batch's kernels may take longer than running them."""
        seconds = self.seconds()
        launches = self.model.n_layer * _KERNELS_A_LAYER * (self.sequences // self.micro_batch)
        return seconds is not None and seconds[0] < launches * _LAUNCH_SECONDS


def _seconds(plan: Plan, known: Ceiling, end: int) -> float:
    """Of a step, everything at its poor (end 0) or good (end 1) rate; the terms are at the top of this file."""
    model, gpus = plan.model, plan.machine.gpus
    L, D, T, P = model.n_layer, model.d_model, plan.context_tokens, parameters(model)
    n, micro_batches = plan.sequences * T, plan.sequences // plan.micro_batch
    bandwidth = _BANDWIDTH[end] * known.bytes_per_second
    again = {"selective": (1, 0), "block": (1, 1)}.get(
        plan.recompute, (0, 0)
    )  # forwards of products, of attention
    products = (
        (6 * (P - positions(model)) + 2 * again[0] * matrices(model))
        * n
        / (_shares(_PRODUCTS, known)[end] * known.bf16_flops)
    )
    attention = (
        (7 + 2 * again[1]) * L * D * T * n / (_shares(_ATTENTION, known)[end] * known.bf16_flops)
    )
    activations = n * (L * D * _LAYER_BYTES[end] + model.vocab_size * _LOGIT_BYTES[end]) / bandwidth
    moved = P * _STEP_BYTES[end] + matrices(model) * (_CAST_BYTES + micro_batches * _SUM_BYTES)
    updates = (moved + micro_batches * model.vocab_size * D * _HEAD_BYTES) / bandwidth
    reduction = 2 * (gpus - 1) / gpus * 4 * P / (_LINK[end] * known.link_bytes_per_second / 2)
    alone = products + attention + activations + updates
    return max(alone, reduction) if end else alone + reduction


def _shares(table: dict[str, tuple[float, float]], known: Ceiling) -> tuple[float, float]:
    return table.get(known.generation, table[_DEFAULT])


def make_plan(options: PlanOptions) -> Plan:
    """Fill in what the options leave out. Raises: InputError for what does not exist or does not divide."""
    config = recipe(options.recipe)
    for name in ("gpus", "micro_batch_size", "context_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")
    if options.price is not None and not 0 <= options.price < math.inf:
        raise InputError(f"--price: expected 0 or more, and finite, got {options.price}")
    T = options.context_tokens or config.model.context_tokens
    recompute = options.recompute or config.execution.recompute
    model = config.with_options(context_tokens=T, recompute=recompute).gpt(
        _vocabulary(options.recipe, config)
    )
    machine = _machine(options.gpu, options.gpus)
    step = _count("--tokens-per-step", options.tokens_per_step) or config.batch_size * T
    sequences, rest = divmod(step, T * machine.gpus)
    if rest:
        raise InputError(
            f"--tokens-per-step: expected a multiple of {machine.gpus} GPUs x {T} tokens, got {step}; "
            f"take {(sequences + 1) * T * machine.gpus}"
        )
    micro_batch = options.micro_batch_size or math.gcd(config.micro_batch, sequences)
    if sequences % micro_batch:
        raise InputError(
            f"--micro-batch-size: expected a divisor of the {sequences} sequences that a GPU has in a step, got {micro_batch}; "
            f"take {_divisor(sequences, micro_batch)}"
        )
    tokens = _count("--tokens", options.tokens) or config.steps * step
    return Plan(
        model=model, machine=machine, sequences=sequences, micro_batch=micro_batch, context_tokens=T, tokens=tokens,
        recompute=recompute,
    )  # fmt: skip


def _vocabulary(name: str, config: TrainConfig) -> int:
    """GPT-2's own for its presets, which learn a smaller one on their recipe's data; else what the tokenizer's spec says."""
    if name in PRESETS:
        return PRESETS[name].vocab_size
    return vocab_size_of(config.tokenizer)


def _machine(gpu: str | None, gpus: int) -> Machine:
    if gpu is not None:
        if gpu.lower() not in CEILINGS:
            raise InputError(
                f"--gpu: expected a GPU of known ceilings, got {gpu!r}; near: {near(gpu.lower(), list(CEILINGS))}"
            )
        known = CEILINGS[gpu.lower()]
        return Machine(
            name=gpu.lower(),
            gpus=gpus,
            memory_bytes=int(known.memory_bytes),
            itemsize=2,
            ceiling=known,
        )
    if torch.cuda.is_available():
        name, memory = (
            torch.cuda.get_device_name(),
            torch.cuda.get_device_properties(0).total_memory,
        )
        return Machine(name=name, gpus=gpus, memory_bytes=memory, itemsize=2, ceiling=ceiling(name))
    if gpus > 1:
        raise InputError(
            f"--gpus: expected 1 on a machine without a GPU, got {gpus}; name one with --gpu"
        )
    return _cpu_machine()


def _cpu_machine(processes: int = 1) -> Machine:
    """What one of several processes has of this machine."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows
        raise InputError(
            "--gpu: expected a GPU here, or its name, got neither; name one, such as h100"
        ) from None
    name = f"this {platform.machine()} CPU"
    return Machine(name=name, gpus=1, memory_bytes=memory // processes, itemsize=4, ceiling=None)


def _count(option: str, text: str | None) -> int | None:
    """A number of tokens as people write it."""
    if text is None:
        return None
    match = re.fullmatch(
        r"(\d+(?:\.\d*)?(?:e\d{1,2})?)([kmbt]?)",
        text.strip().lower().replace(",", "").replace("_", ""),
    )
    count = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise InputError(
            f"{option}: expected a number of tokens such as 10B, 500M, 1.5e9 or 524288, got {text!r}"
        )
    return count


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def plan(argv: Sequence[str]) -> int:
    """tritium plan"""
    description = (
        "What a run needs: does it fit, how long does it take, what does it cost.\n\n\nrecipes: "
        + ", ".join(RECIPES)
    )
    description += "\n\ngpus: " + ", ".join(CEILINGS)
    options = parse(PlanOptions, argv, prog="tritium plan", description=description)
    print("\n".join(describe(make_plan(options), options.recipe, options.price)))
    return 0


def describe(plan: Plan, name: str, price: float | None) -> list[str]:
    """The plan as lines of text: does it fit, of what sizes, in which parts, how long, for how much."""
    model, machine = plan.model, plan.machine
    where = machine.name if machine.gpus == 1 else f"{machine.gpus} x {machine.name}"
    accumulated = plan.sequences // plan.micro_batch
    return [
        f"{name} on {where}: {_verdict(plan)}",
        "",
        f"model      {parameters(model):,} parameters: {model.n_layer} layers of {model.d_model}, {model.vocab_size:,} tokens",
        f"a step     {plan.tokens_per_step:,} tokens; on each device {accumulated} x {plan.micro_batch} sequences "
        f"of {plan.context_tokens:,} tokens",
        "",
        *_describe_memory(plan),
        "",
        *_describe_time(plan, price),
    ]


def _verdict(plan: Plan) -> str:
    need, memory = sum(plan.memory(plan.micro_batch).values()), plan.machine.memory_bytes
    most = plan.largest_micro_batch()
    sizes = f"{_size(need)} of {_size(memory)}"
    if plan.fits(plan.micro_batch):
        return f"fits, {sizes}; at most {most} sequences at once" + (
            " (all of a step)" if most == plan.sequences else ""
        )
    if most:
        less = f"--micro-batch-size {_divisor(plan.sequences, most)} does (at most {most} at once)"
        return f"does not fit, {sizes}; {less}{_leaner(plan, plan.micro_batch, ', and so does ')}"
    less = (
        _leaner(plan, 1, "; one does with ")
        or "; take more memory, a smaller model or fewer --context-tokens"
    )
    return f"does not fit, {sizes}, nor does a single sequence{less}"


def what_fits(record: RunRecord, world: World) -> str:
    """What to say of a run that found no more memory: the plan of it on this machine."""
    config, execution = record.train, resolve(record.train, world)
    itemsize = execution.dtype.itemsize
    machine = (
        _machine(None, 1) if execution.device.type == "cuda" else _cpu_machine(world.local_size)
    )
    plan = Plan(
        model=record.model, machine=replace(machine, gpus=world.data_ranks, itemsize=itemsize),
        sequences=config.batch_size // world.data_ranks, micro_batch=execution.micro_batch,
        context_tokens=config.model.context_tokens, tokens=config.steps, recompute=config.execution.recompute,
    )  # fmt: skip
    undivided = ", nothing divided between ranks," if execution.engine.divides_memory else ""
    advice = (
        "; free what else is in it, or start anew with a smaller --micro-batch-size"
        if plan.fits(plan.micro_batch)
        else ""
    )
    return f"out of memory: by the formulas of `tritium plan`{undivided} a step {_verdict(plan)}{advice}"


def _leaner(plan: Plan, micro_batch: int, words: str) -> str:
    """The cheapest recomputation with which that many sequences fit, after `words`; nothing if there is none."""
    modes = [name for name in RECOMPUTATIONS if name != "gelu" or plan.model.mlp == "gelu"]
    fitting = (name for name in modes if replace(plan, recompute=name).fits(micro_batch))
    return "".join(f"{words}--recompute {name}" for name in itertools.islice(fitting, 1))


def _describe_memory(plan: Plan) -> list[str]:
    notes = {
        "weights": "float32",
        "copies": "of weights in bf16, for products",
        "gradients": "float32",
        "optimizer": "AdamW's two moments, float32",
        "activations": "kept for the backward",
        "head": "a chunk of logits, gradients of the embedding",
        "temporaries": "of the backward",
        "process": "context and libraries: an estimate",
    }
    parts = plan.memory(plan.micro_batch)
    rows = [
        f"  {name:12}{_size(parts[name]):>10}  {note}"
        for name, note in notes.items()
        if parts[name]
    ]
    total = f"  {'total':12}{_size(sum(parts.values())):>10}  {RESERVE:.0%} of the memory has to stay free: an estimate"
    return ["memory of each device at a step's fullest moment, by formula:", *rows, total]


def _describe_time(plan: Plan, price: float | None) -> list[str]:
    if (seconds := plan.seconds()) is None:
        return ["time: no ceilings known for this device; name a GPU with --gpu"]
    known, gpus = plan.machine.ceiling, plan.machine.gpus
    flops = flops_per_token(plan.model, plan.context_tokens)
    speeds = [plan.tokens_per_step / each for each in seconds]
    whole = [plan.tokens / speed for speed in speeds]
    fast, slow = speeds
    rows = {
        "step": _time_range(*seconds),
        "tokens/s": f"{_number(slow)} to {_number(fast)}",
        "MFU": " to ".join(
            f"{speed * flops / (gpus * known.bf16_flops):.0%}" for speed in (slow, fast)
        ),
        f"{plan.tokens:,} tokens": _time_range(*whole),
    }
    if price is not None:
        low, high = (each / 3600 * gpus * price for each in whole)
        rows["price"] = f"{_number(low)} to {_number(high)}, at {price:g} for a GPU and hour"
    width = max(map(len, rows)) + 2
    assumed = (
        ""
        if known.generation in _PRODUCTS
        else f"; shares of {known.generation} taken as {_DEFAULT}'s"
    )
    title = f"time, an estimate from the device's ceilings, without launches, data and evaluations{assumed}:"
    last = f"a run at less than {_number(slow)} tokens/s on this hardware is leaving speed behind"
    if plan.is_launch_bound():
        last = "so small a micro-batch is bound by launching kernels, which this leaves out: expect it to be slower"
    return [title, *(f"  {name:{width}}{row}" for name, row in rows.items()), "", last]


def _time_range(low: float, high: float) -> str:
    """Seconds in a unit that leaves numbers people can read."""
    unit, seconds = ("hours", 3600) if high >= 360 else ("s", 1) if high >= 1 else ("ms", 1e-3)
    return f"{_number(low / seconds)} to {_number(high / seconds)} {unit}"


def _number(number: float) -> str:
    """Three digits: an estimate has no more."""
    return f"{number:.3g}" if number < 100 else f"{float(f'{number:.3g}'):,.0f}"


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"
