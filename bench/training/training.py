"""Training speed beside a plain PyTorch GPT: tritium bench train [RECIPE] [--key value ...].

On a GPU tritium's model takes part with each other attention that is installed, too, and anywhere the model of a nanoGPT
checkout with --nanogpt; contestants.py says who trains how. All have the same weights, schedule, decay and clipping and take
the same batches, in turn: rounds of a few steps, the order reversed from one to the next. A step is one micro-batch moved to
the device, forward and backward, clipping and AdamW; a run that adds up several micro-batches has the last two less often.
Tokens are drawn at random before the clock starts, frequent and rare as in text (Zipf: one over the rank), as repeated tokens
meet in the embedding's gradient. ForwardContext data, evaluations and checkpoints are not in the figures. Products of float32 and the
allocator are set as the trainer sets them, for all.

Before anything is timed all must agree with the baseline on the first batch to what rounding explains:

    roundings   a value on its way from embedding to logit is rounded R = 11 L + 3 times, each time by at most u = eps / 2 of
                the products' dtype + sqrt(F) eps / 2 of float32 for the sum inside the longest product. They add up like a
                random walk, in two programs: a logit is off by r = sqrt(2 R) u of the largest
    loss        |l - l'| <= 2 r max|logit| + (8 + sqrt(N)) eps l, eps of float32: a token's loss has the gradient p - onehot by
                its logits, of absolute sum 2 at most; the mean sums N of them
    gradients   |g - g'| <= sqrt(3) r |g|, over all parameters at once: the backward has twice the roundings again

In bf16 the gradients' bound is the sharper: a baseline without causal mask or with ReLU is off by 0.4 or more where 0.07 is
allowed, a right one by 0.004 (laptop's shape, bfloat16 on a CPU). Later losses are shown and not judged: AdamW's first steps
have the size of the learning rate even where a gradient is all rounding.

MFU        tokens a second x flops_per_token (model/cost.py) / the device's bf16 peak (kernels/_device.py)
Memory     CUDA: most bytes that PyTorch had allocated in a contestant's rounds, less the others' weights and optimizer state
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

from ...errors import InputError
from ...kernels.core.device import ceiling
from ...model import GPTConfig
from ...model.cost import flops_per_token, parameters
from ...train.commands.cli import parse
from ...train.config import TrainConfig
from ...train.data.loader import Batch
from ...train.data.tokenizer import vocab_size_of
from ...train.device import choose_device, choose_matmul, keep_freed_memory
from ...train.execution import compiles_on
from ...train.precision import choose_dtype
from ...train.recipes import RECIPES, default_recipe, recipe
from ...train.run.profile import Row, activities, operators
from ..record import provenance, writable, write_record
from .implementations import (
    Contestant,
    checkout_model,
    chosen_attentions,
    make_contestants,
    nanogpt_shape,
)

PROFILED_STEPS = 3
PROFILE_ROWS = 12
# Timed steps, warm-up steps; timed steps a round and, since CUDA's queue runs dry between rounds, steps not timed before them.
PROTOCOL = {"cuda": (100, 10, 10, 1), "cpu": (10, 2, 1, 0)}
# Norm, qkv, probabilities, sum of values, projection, addition; norm, product, GELU, product, addition.
# Embedding, last norm, logits.
ROUNDINGS_A_BLOCK, ROUNDINGS_ELSEWHERE = 11, 3

HELP = f"""Tokens a second, MFU, memory and losses of training beside a plain PyTorch GPT.


tritium bench train [RECIPE] [--key value ...]      recipes: {", ".join(RECIPES)}"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `tritium bench train`."""

    steps: int | None = None
    """Timed steps of each; default: 100 on CUDA, 10 on a CPU."""
    warmup_steps: int | None = None
    """Steps of each before them; default: 10 on CUDA, 2 on a CPU."""
    micro_batch_size: int | None = None
    """Sequences a step, all at once; default: the recipe's."""
    context_tokens: int | None = None
    """Tokens a sequence; default: the recipe's."""
    vocab_size: int | None = None
    """Tokens that can be predicted; default: as the recipe's tokenizer has."""
    compile: Literal["auto", "on", "off", "each"] = "auto"
    """Whether torch.compile is used; each: all take part twice, with and without; auto: as the trainer, on CUDA only."""
    attention: tuple[Literal["sdpa", "flash-attn"], ...] | None = None
    """What else tritium's model is trained with beside its own; default: on CUDA each that is installed, on a CPU none."""
    nanogpt: str | None = None
    """Folder of a nanoGPT checkout, whose model then takes part, trained as its train.py does."""
    device: str = "auto"
    """cpu, cuda or cuda:1; auto: CUDA if there is one, else the CPU."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""

    def __post_init__(self):
        for name, least in {
            "steps": 1,
            "warmup_steps": 0,
            "micro_batch_size": 1,
            "context_tokens": 1,
            "vocab_size": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(
                    f"--{name.replace('_', '-')}: expected {least} or more, got {value}"
                )


def main(argv: Sequence[str]) -> int:
    """tritium bench train"""
    named = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if named else default_recipe()
    config = recipe(name)
    options = parse(Options, argv[named:], prog="tritium bench train", description=HELP)
    device = choose_device(options.device)
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"--device: expected cpu or cuda, whose steps can be timed here, got {options.device}"
        )
    micro, context = (
        options.micro_batch_size or config.micro_batch,
        options.context_tokens or config.model.context_tokens,
    )
    config = config.with_options(micro_batch_size=micro, batch_size=micro, context_tokens=context)
    shape = config.gpt(options.vocab_size or vocab_size_of(config.tokenizer))
    shape = shape if options.nanogpt is None else nanogpt_shape(shape)
    out = None if options.out is None else writable(Path(options.out))
    figures = {"recipe": name, **measure(config, shape, options, device)}
    print(render(provenance() | figures))
    if out:
        write_record(out, "train", figures)
        print(f"\nfigures: {out}")
    return 0


def measure(
    config: TrainConfig, shape: GPTConfig, options: Options, device: torch.device
) -> dict[str, Any]:
    """Train all, and return every figure of the record. Raises: InputError if they do not agree on the first batch."""
    choose_matmul(device)
    keep_freed_memory()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    steps, warmup_steps, _, _ = PROTOCOL[device.type]
    steps = options.steps or steps
    warmup_steps = warmup_steps if options.warmup_steps is None else options.warmup_steps
    compiled = {"on": [True], "off": [False], "each": [False, True]}.get(
        options.compile, [compiles_on(device)]
    )
    attentions = chosen_attentions(config, options.attention, device)
    nanogpt = None if options.nanogpt is None else checkout_model(Path(options.nanogpt))
    contestants = make_contestants(config, shape, device, compiled, attentions, nanogpt)
    ours, baseline = (
        contestants[0],
        next(contestant for contestant in contestants if contestant.kind == "baseline"),
    )
    batch = functools.partial(random_batch, config, shape)
    others = (contestant for contestant in contestants if contestant is not baseline)
    agreement = {other.name: check_agreement(config, other, baseline, batch(0)) for other in others}
    for step in range(warmup_steps):
        for contestant in contestants:
            contestant.step(batch(step))
    seconds, peaks = _rounds(contestants, batch, steps, device)
    medians = [[statistics.median(times) for times in rounds] for rounds in seconds]
    figures = {
        contestant.name: _figures(
            contestant, config, [time for times in rounds for time in times], peak, device
        )
        for contestant, rounds, peak in zip(contestants, seconds, peaks, strict=True)
    }
    # Compiled ones beside tritium's compiled.
    mine = {
        c.compiled: times
        for c, times in zip(contestants, medians, strict=True)
        if c.kind == "tritium"
    }
    for contestant, theirs in zip(contestants, medians, strict=True):
        ratios = [other / own for own, other in zip(mine[contestant.compiled], theirs, strict=True)]
        figures[contestant.name] |= {"kind": contestant.kind, "ratio": _spread(ratios)}
    return {
        "shape": asdict(shape),
        "parameters": parameters(shape),
        "micro_batch_size": config.micro_batch,
        "context_tokens": config.model.context_tokens,
        "steps": steps,
        "warmup_steps": warmup_steps,
        "device": device.type,
        "dtype": str(choose_dtype(config.execution.precision, device)).removeprefix("torch."),
        "agreement": agreement,
        "contestants": figures,
        # After all timing: once used, a profiler may slow what follows.
        "profile": {
            contestant.name: profiled(contestant, batch(0), device)
            for contestant in (ours, baseline)
        },
    }


def random_batch(config: TrainConfig, shape: GPTConfig, step: int) -> Batch:
    """A batch of a step, the same whoever asks."""
    frequencies = 1 / torch.arange(1, shape.vocab_size + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(step)
    sizes = (config.micro_batch, config.model.context_tokens + 1)
    drawn = torch.multinomial(
        frequencies, math.prod(sizes), replacement=True, generator=generator
    ).view(sizes)
    return Batch(drawn, np.full(len(drawn), config.model.context_tokens))


def check_agreement(
    config: TrainConfig, ours: Contestant, baseline: Contestant, batch: Batch
) -> dict[str, float]:
    """Compare losses and gradients of a batch; returns the gaps and their bounds, see the top of this file.

    Raises: InputError if a gap is above its bound: speeds of different models are no comparison.
    """
    (ours_loss, ours_grads), (their_loss, their_grads) = (
        each.gradients(batch) for each in (ours, baseline)
    )
    losses = [loss.double().item() for loss in (ours_loss, their_loss)]
    pairs = [(gradient, their_grads[name]) for name, gradient in ours_grads.items()]
    squares = torch.stack(
        [
            torch.stack(((a - b).double().square().sum(), b.double().square().sum()))
            for a, b in pairs
        ]
    )
    gap, norm = squares.sum(dim=0).sqrt().tolist()
    plain = baseline.trainer.working
    with torch.no_grad():
        largest = plain(batch[:1].on(plain.wte.weight.device)[0]).abs().max().item()
    dtype = choose_dtype(config.execution.precision, plain.wte.weight.device)

    shape, eps = ours.shape, torch.finfo(torch.float32).eps
    unit = torch.finfo(dtype).eps / 2 + math.sqrt(shape.d_feedforward) * eps / 2
    walk = math.sqrt(2 * (ROUNDINGS_A_BLOCK * shape.n_layer + ROUNDINGS_ELSEWHERE)) * unit
    found = {
        "loss_gap": abs(losses[0] - losses[1]),
        "loss_bound": 2 * walk * largest
        + (8 + math.sqrt(batch.inputs.numel())) * eps * abs(losses[1]),
        "gradient_gap": gap / norm,
        "gradient_bound": math.sqrt(3) * walk,
    }
    for what in ("loss", "gradient"):
        if not found[f"{what}_gap"] <= found[f"{what}_bound"]:  # not >: a NaN is no agreement
            raise InputError(
                f"bench train: expected {ours.name}'s and the baseline's {what} on the first batch to part by rounding, up to "
                f"{found[f'{what}_bound']:.2g}, got {found[f'{what}_gap']:.2g} (losses {losses[0]:.6f} and {losses[1]:.6f}), "
                "and reports no speed; run the tests: one of the two is wrong"
            )
    return found


def _rounds(
    contestants: Sequence[Contestant],
    batch: Callable[[int], Batch],
    steps: int,
    device: torch.device,
) -> tuple:
    """Train all in turn; returns for each its rounds' lists of seconds a step, and its peak bytes, None on a CPU."""
    on_cuda = device.type == "cuda"
    _, _, size, untimed = PROTOCOL[device.type]
    places = range(len(contestants))
    seconds, peaks = [[] for _ in places], [0 if on_cuda else None for _ in places]
    for number, start in enumerate(range(0, steps, size)):
        first = len(contestants[0].losses)
        batches = [batch(first + step) for step in range(untimed + min(size, steps - start))]
        for place in places if number % 2 == 0 else reversed(places):
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            seconds[place].append(_timed(contestants[place], batches, device)[untimed:])
            if on_cuda:
                held = sum(contestants[other].held_bytes() for other in places if other != place)
                peaks[place] = max(peaks[place], torch.cuda.max_memory_allocated(device) - held)
    return seconds, peaks


def _timed(contestant: Contestant, batches: list[Batch], device: torch.device) -> list[float]:
    """Train on the batches; returns seconds of each step, from the end of the one before it."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for batch in batches:
            contestant.step(batch)
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(batches) + 1)]
    events[0].record()
    for batch, event in zip(batches, events[1:], strict=True):
        contestant.step(batch)
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def _figures(
    contestant: Contestant,
    config: TrainConfig,
    seconds: list[float],
    peak: int | None,
    device: torch.device,
) -> dict:
    rate = config.micro_batch * config.model.context_tokens / statistics.median(seconds)
    flops = flops_per_token(contestant.shape, config.model.context_tokens)
    known = ceiling(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    losses = torch.stack(contestant.losses).tolist()
    if not all(map(math.isfinite, losses)):
        raise InputError(
            f"bench train: expected finite losses, got {losses[-1]} from {contestant.name}; give fewer --steps"
        )
    return {
        "compiled": contestant.compiled,
        "tokens_per_second": rate,
        "step_seconds": _spread(seconds),
        "mfu": known and rate * flops / known.bf16_flops,
        "peak_memory_bytes": peak,
        "losses": losses,
    }


def _spread(values: list[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def profiled(contestant: Contestant, batch: Batch, device: torch.device) -> list[dict[str, Any]]:
    """Where a step's time goes, the longest first, as train/profile.py tells it; the last row is all that is not shown."""
    with torch.profiler.profile(activities=activities(device)) as trace:
        for _ in range(PROFILED_STEPS):
            contestant.step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    rows = operators(trace.events(), PROFILED_STEPS, device)
    shown, left = rows[:PROFILE_ROWS], rows[PROFILE_ROWS:]
    seconds, share = (sum(getattr(row, name) for row in left) for name in ("seconds", "share"))
    rest = Row(part="everything else", operator="", seconds=seconds, share=share, calls=None)
    return [asdict(row) for row in (*shown, rest)]


def render(figures: dict[str, Any]) -> str:
    """A record of main's, with its provenance, as the terminal shows it."""
    shape, contestants = figures["shape"], figures["contestants"]
    machine = (
        figures["gpu"]
        if figures["device"] == "cuda"
        else f"{figures['cpu']}, {figures['threads']} threads"
    )
    lines = [
        f"{figures['recipe']} on {machine}: {figures['parameters']:,} parameters, vocabulary {shape['vocab_size']:,}, "
        f"products in {figures['dtype']}",
        f"{figures['micro_batch_size']} x {figures['context_tokens']} random tokens a step, {figures['steps']} timed steps of "
        f"each, in turn, after {figures['warmup_steps']}",
        "",
        f"{'':20}{'compiled':>9}{'tokens/s':>12}{'step ms':>10}{'p10 to p90':>18}{'MFU':>7}{'peak memory':>14}",
    ]
    for name, row in contestants.items():
        median, p10, p90 = (1e3 * row["step_seconds"][key] for key in ("median", "p10", "p90"))
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = (
            "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
        )
        lines.append(
            f"{name:20}{'yes' if row['compiled'] else 'no':>9}{row['tokens_per_second']:12,.0f}{median:10.2f}"
            f"{f'{p10:.2f} to {p90:.2f}':>18}{mfu:>7}{memory:>14}"
        )
    for name, row in contestants.items():
        if row["kind"] in ("baseline", "nanoGPT"):
            ratio, p10, p90 = (row["ratio"][key] for key in ("median", "p10", "p90"))
            spread = f"(p10 to p90 of the rounds: {p10:.2f} to {p90:.2f})"
            lines.append(f"tritium makes {ratio:.2f} times the tokens/s of {name} {spread}")
    # In nine of ten rounds, so that it is no noise.
    ours = [
        row
        for row in contestants.values()
        if row["kind"].startswith("tritium, ") and row["ratio"]["p90"] < 1
    ]
    if ours:
        fastest = min(ours, key=lambda row: row["ratio"]["median"])
        times = 1 / fastest["ratio"]["median"]
        lines.append(
            f"train with --attention {fastest['kind'].split()[-1]} here: {times:.2f} times the tokens/s of tritium's own"
        )
    if figures["device"] == "cpu":
        lines.append(
            "no Triton kernel runs on a CPU, so the ratio says nothing of a GPU; peak memory is not measured here"
        )
    if contestants["tritium"]["mfu"] is None:
        lines.append("no MFU: device not in the table of kernels/_device.py")
    return "\n".join([*lines, "", *_loss_table(figures), "", *_profile_table(figures["profile"])])


def _loss_table(figures: dict[str, Any]) -> list[str]:
    losses = {name: row["losses"] for name, row in figures["contestants"].items()}
    steps = sorted({round(place * (len(losses["tritium"]) - 1) / 5) for place in range(6)})
    lines = [f"{'loss, step':20}" + "".join(f"{step + 1:>10}" for step in steps)]
    lines += [
        f"{name:20}" + "".join(f"{values[step]:10.4f}" for step in steps)
        for name, values in losses.items()
    ]
    for name, found in figures["agreement"].items():
        apart = max(abs(a - b) / b for a, b in zip(losses[name], losses["baseline"], strict=True))
        lines += [
            f"{name} and baseline: apart by {apart:.1e} of the loss at most",
            f"on the first batch by {found['loss_gap']:.1e} (rounding explains up to {found['loss_bound']:.1e}), gradients by "
            f"{found['gradient_gap']:.1e} of their norm (up to {found['gradient_bound']:.1e})",
        ]
    return lines


def _profile_table(profiles: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Both profiles side by side."""
    columns = [
        [f"{f'{name}: where a step goes':42}{'ms':>8}{'share':>7}"]
        + [f"{_shortened(row):42}{1e3 * row['seconds']:8.2f}{row['share']:7.1%}" for row in rows]
        for name, rows in profiles.items()
    ]
    return ["   ".join(pair).rstrip() for pair in itertools.zip_longest(*columns, fillvalue="")]


def _shortened(row: dict[str, Any]) -> str:
    """At most 40 characters of part and operator: start and end, which tells forward from backward."""
    name = f"{row['part']}: {row['operator']}".removesuffix(": ")
    return name if len(name) <= 40 else f"{name[:19]}...{name[-18:]}"
