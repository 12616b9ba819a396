"""tritium bench train: compare training speed with a plain PyTorch GPT.

implementations.py lists the models: tritium's, on a GPU also with each other attention that is
installed, the baseline, and with --nanogpt the model of a nanoGPT checkout. All run in this process
and have the same weights, learning rates, weight decay and clipping. agreement.py first checks that
they compute the same function.

Fairness
    interleaving   Models train in turn, in rounds of a few steps (one step on a CPU). Each round
                   reverses the order. Clocks, temperatures and other programs affect all alike.
    data           All models get the same batches. Random tokens are drawn before the clock starts,
                   frequent and rare ones as in text (Zipf: probability proportional to 1 / rank),
                   because repeated tokens collide in the gradient of the embedding.
    step           One micro-batch, or those of --batch-size: copy to the device, forward, backward;
                   then clipping and AdamW. Reading data, evaluations and checkpoints are not
                   included.
    size           A recipe of a published model has its published vocabulary.
    dropout        None: models that draw different random numbers cannot be compared.
    optimizer      AdamW, also for recipes with another.
    settings       The precision of float32 matmuls and the allocator are set as in training, for
                   all models.
    statistics     Medians over all timed steps, with 10th and 90th percentiles. The ratio is the
                   median over rounds of (median step of the model / median step of tritium in the
                   same round), so that a slow phase of the machine cancels.

MFU        tokens per second x flops_per_token (model/cost.py) / bf16 peak of the device
           (train/machine/gpus.py)
Memory     CUDA: peak bytes that PyTorch allocated in a model's first steps, without the weights
           and optimizer states of the other models
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...errors import InputError, check_positive
from ...model import GPTConfig
from ...model.config import DROPOUTS
from ...model.cost import flops_per_token, parameters
from ...train.commands.cli import parse
from ...train.config import TrainConfig
from ...train.data.loader import Batch, token_orders
from ...train.data.tokenizers.tokenizer import vocab_size_of
from ...train.execution import compiles_on
from ...train.machine.device import choose_device, choose_matmul, keep_freed_memory
from ...train.machine.gpus import ceiling
from ...train.precision import choose_dtype
from ...train.recipes import RECIPES, default_recipe, recipe
from ..record import check_writable, provenance, write_record
from ..report import training_table
from ..timing import summary
from .agreement import check_agreement
from .implementations import (
    TrainedModel,
    choose_attentions,
    import_nanogpt,
    make_implementations,
    nanogpt_shape,
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How many steps are run. CUDA's queue is empty between rounds: first steps are not timed."""

    steps: int
    warmup_steps: int
    steps_per_round: int
    untimed_per_round: int


PROTOCOLS = {
    "cuda": Protocol(steps=100, warmup_steps=10, steps_per_round=10, untimed_per_round=1),
    "cpu": Protocol(steps=10, warmup_steps=2, steps_per_round=1, untimed_per_round=0),
}

HELP = f"""Compare tokens per second, MFU, memory and losses with a plain PyTorch GPT.


tritium bench train [RECIPE] [--key value ...]      recipes: {", ".join(RECIPES)}"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `tritium bench train`."""

    steps: int | None = None
    """Timed steps per model; default: 100 on CUDA, 10 on a CPU."""
    batch_size: int | None = None
    """Sequences per step; default: one micro-batch."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward; default: the recipe's."""
    context_tokens: int | None = None
    """Tokens per sequence; default: the recipe's."""
    compile: Literal["auto", "on", "off", "each"] = "auto"
    """Whether to use torch.compile. each: compare every model with and without; auto: on CUDA."""
    cuda_graph: Literal["auto", "off"] = "auto"
    """Whether tritium and the baseline launch steps as CUDA graphs. nanoGPT does not."""
    attention: tuple[Literal["sdpa", "flash-attn"], ...] | None = None
    """Other attentions for tritium's model; default: on CUDA all that are installed, else none."""
    nanogpt: str | None = None
    """Folder of a nanoGPT checkout. Its model takes part, trained like its train.py."""
    device: str = "auto"
    """cpu, cuda or cuda:1; auto: CUDA if there is a GPU, else the CPU."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""

    def __post_init__(self):
        check_positive(self, "steps", "batch_size", "micro_batch_size", "context_tokens")


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench train`. Returns: exit status."""
    # Read the recipe and the options.
    has_recipe = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if has_recipe else default_recipe()
    config = recipe(name)
    options = parse(Options, argv[has_recipe:], prog="tritium bench train", description=HELP)
    device = choose_device(options.device)
    if device.type not in PROTOCOLS:
        raise InputError(f"--device: expected cpu or cuda, got {options.device}")

    # The sizes of a step.
    micro_batch = options.micro_batch_size or config.micro_batch
    context_tokens = options.context_tokens or config.model.context_tokens
    config = config.with_options(
        micro_batch_size=micro_batch,
        batch_size=options.batch_size or micro_batch,
        context_tokens=context_tokens,
        cuda_graph=options.cuda_graph,
        **dict.fromkeys(DROPOUTS, 0.0),
    )
    if config.optimizer != "adamw":  # nanoGPT has no other
        config = config.with_options(optimizer="adamw", lr=1e-3)
    shape = config.gpt(vocab_size_of(config.tokenizer))
    if options.nanogpt is not None:
        shape = nanogpt_shape(shape)
    out = check_writable(options.out)

    # Measure, show and write.
    if device.type == "cpu":
        print("No GPU: no Triton kernel runs, so the ratios say nothing about a GPU.\n")
    figures = {"recipe": name, **measure(config, shape, options, device)}
    print(training_table(provenance() | figures, speeds=True))
    print("\n" + "\n".join(_agreement_lines(figures)))
    if out:
        write_record(out, "train", figures)
    return 0


def measure(
    config: TrainConfig, shape: GPTConfig, options: Options, device: torch.device
) -> dict[str, Any]:
    """Train all models and return the figures of the record.

    Raises: InputError if the models do not agree on the first batch.
    """
    # Set up the device as the trainer does.
    choose_matmul(device)
    keep_freed_memory()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)

    # Make the models and compare them with the baseline.
    nanogpt = None if options.nanogpt is None else import_nanogpt(Path(options.nanogpt))
    compiled = {
        "on": [True],
        "off": [False],
        "each": [False, True],
        "auto": [compiles_on(device)],
    }
    attentions = choose_attentions(config, options.attention, device)
    models = make_implementations(
        config, shape, device, compiled[options.compile], attentions, nanogpt
    )
    baseline = next(model for model in models if model.kind == "baseline")
    batch = functools.partial(random_batch, config, shape)
    others = [model for model in models if model is not baseline]
    agreement = {one.name: check_agreement(config, one, baseline, batch(0)) for one in others}

    # Warm up and train in turn.
    protocol = PROTOCOLS[device.type]
    steps = options.steps or protocol.steps
    peaks = [_warm_up(model, models, batch, device) for model in models]
    rounds = train_in_turn(models, batch, steps, device)
    columns = zip(models, rounds, peaks, _ratios(models, rounds), strict=True)
    implementations = {
        model.name: _figures(model, config, list(itertools.chain(*seconds)), peak, ratio, device)
        for model, seconds, peak, ratio in columns
    }
    return {
        "shape": asdict(shape),
        "parameters": parameters(shape),
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch,
        "context_tokens": config.model.context_tokens,
        "steps": steps,
        "warmup_steps": protocol.warmup_steps,
        "device": device.type,
        "cuda_graph": models[0].trainer.engine.execution.cuda_graph,
        "dtype": str(choose_dtype(config.execution.precision, device)).removeprefix("torch."),
        "agreement": agreement,
        "implementations": implementations,
    }


def random_batch(config: TrainConfig, shape: GPTConfig, step: int) -> Batch:
    """Return the batch of a step: random tokens, where frequency is proportional to 1 / rank."""
    frequencies = 1 / torch.arange(1, shape.vocab_size + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(step)
    context_tokens = config.model.context_tokens
    B = config.batch_size
    sizes = (B, context_tokens + 1)
    tokens = torch.multinomial(frequencies, math.prod(sizes), replacement=True, generator=generator)
    windows = tokens.view(sizes)
    orders = token_orders(windows, config.micro_batch)
    return Batch(windows, np.full(B, context_tokens), orders, config.micro_batch)


def _warm_up(
    model: TrainedModel,
    models: Sequence[TrainedModel],
    batch: Callable[[int], Batch],
    device: torch.device,
) -> int | None:
    """Train the first steps of a model.

    Returns: its peak bytes, without what the others hold; None on a CPU. Later steps need no more.
        A step that was recorded as a CUDA graph allocates nothing when it is replayed.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(PROTOCOLS[device.type].warmup_steps):
        model.step(batch(step))
    if not on_cuda:
        return None
    others = sum(other.held_bytes() for other in models if other is not model)
    return torch.cuda.max_memory_allocated(device) - others


def train_in_turn(
    models: Sequence[TrainedModel],
    batch: Callable[[int], Batch],
    steps: int,
    device: torch.device,
) -> list[list[list[float]]]:
    """Train all models in rounds, in turn, in reversed order every second round.

    Returns: seconds of each timed step by [model][round][step].
    """
    protocol = PROTOCOLS[device.type]
    untimed = protocol.untimed_per_round
    seconds: list[list[list[float]]] = [[] for _ in models]
    places = range(len(models))
    for number, start in enumerate(range(0, steps, protocol.steps_per_round)):
        timed = min(protocol.steps_per_round, steps - start)
        first = len(models[0].losses)
        batches = [batch(first + step) for step in range(untimed + timed)]
        for place in places if number % 2 == 0 else reversed(places):
            seconds[place].append(_step_seconds(models[place], batches, device)[untimed:])
    return seconds


def _step_seconds(
    model: TrainedModel, batches: Sequence[Batch], device: torch.device
) -> list[float]:
    """Train on the batches. Return the seconds of each step, from the end of the one before."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for batch in batches:
            model.step(batch)
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(batches) + 1)]
    events[0].record()
    for batch, event in zip(batches, events[1:], strict=True):
        model.step(batch)
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def _ratios(
    models: Sequence[TrainedModel], rounds: Sequence[Sequence[Sequence[float]]]
) -> list[dict[str, float]]:
    """Return for each model how much faster tritium is in the same rounds, compiled alike."""
    medians = [[statistics.median(seconds) for seconds in one] for one in rounds]
    tritium = {
        model.compiled: seconds
        for model, seconds in zip(models, medians, strict=True)
        if model.kind == "tritium"
    }
    ratios = []
    for model, seconds in zip(models, medians, strict=True):
        pairs = zip(seconds, tritium[model.compiled], strict=True)
        ratios.append(summary([other / own for other, own in pairs]))
    return ratios


def _figures(
    model: TrainedModel,
    config: TrainConfig,
    seconds: list[float],
    peak: int | None,
    ratio: dict[str, float],
    device: torch.device,
) -> dict[str, Any]:
    """Return a model's entry of the record."""
    context_tokens = config.model.context_tokens
    tokens_per_second = config.batch_size * context_tokens / statistics.median(seconds)
    flops = tokens_per_second * flops_per_token(model.shape, context_tokens)
    known = ceiling(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    losses = torch.stack(model.losses).tolist()
    if not all(map(math.isfinite, losses)):
        raise InputError(
            f"bench train: expected finite losses, got {losses[-1]} from {model.name}; "
            "give fewer --steps"
        )
    return {
        "kind": model.kind,
        "compiled": model.compiled,
        "tokens_per_second": tokens_per_second,
        "step_seconds": summary(seconds),
        "mfu": None if known is None else flops / known.bf16_flops,
        "peak_memory_bytes": peak,
        "losses": losses,
        "ratio": ratio,
    }


def _agreement_lines(figures: dict[str, Any]) -> list[str]:
    """Return how far each model is from the baseline on the first batch, and its last loss."""
    lines = ["First batch compared with the baseline, and the loss after the last step:"]
    for name, row in figures["implementations"].items():
        found = figures["agreement"].get(name, {})  # none for the baseline
        gaps = [
            f"{quantity} differs by {found[f'{quantity}_gap']:.1e}, "
            f"bound {found[f'{quantity}_bound']:.1e}; "
            for quantity in ("loss", "gradient")
            if found
        ]
        lines.append(f"  {name}: {''.join(gaps)}last loss {row['losses'][-1]:.4f}")
    return lines
