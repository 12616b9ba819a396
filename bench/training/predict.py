"""tritium bench predict: estimate a training step, kernel by kernel, without a GPU.

step.py records the work of the trainer's own step. efficiency.py gives each kind of kernel an
efficiency and its reason. Host and GPU work at the same time, so a step takes the larger of:

    GPU     the sum over all kernels of floor / efficiency + GAP_SECONDS
    host    the time to start all operators

Assumptions: one GPU. Each elementwise operator is a kernel of its own, although torch.compile would
fuse some; they are marked with *. Data, evaluations and checkpoints take no time. The clock is that
of a long matmul. With --measure, a profile of real steps on this machine is shown next to the
prediction.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import tyro
from rich.table import Table

from ...errors import InputError, check_positive
from ...model import GPT
from ...model.cost import flops_per_token
from ...train.commands.cli import parse
from ...train.config import TrainConfig
from ...train.execution import compiles_on
from ...train.machine.device import choose_device, choose_matmul
from ...train.machine.gpus import CEILINGS, ceiling
from ...train.plan import Plan, PlanOptions, make_plan
from ...train.recipes import recipe
from ...train.run.profile import WARMUP_STEPS, activities, operators
from ...train.terminal.progress import table_console
from ..ops.attention import backward_in
from ..record import check_writable, write_record
from ..report import predict_table
from .efficiency import (
    EFFICIENCIES,
    GAP_SECONDS,
    HOST_SECONDS,
    LIMITS,
    Limits,
    efficiency_of,
    floor_seconds,
)
from .implementations import TrainedModel
from .step import Work, step_work
from .training import random_batch

# Steps to predict without a recipe: recipe, sequences per step, sequences per micro-batch. None: as
# in the recipe.
STEPS = (
    ("gpt2", 64, 64),
    ("gpt2", None, None),
    ("gpt2-medium", None, None),
    ("gpt2-xl", None, None),
)
# The table on the screen adds up rows that take less than this fraction of the step.
SMALL_SHARE = 0.002
# A measured time that is further from its prediction is marked.
TOLERANCE = 0.2


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of `tritium bench predict`."""

    recipe: tyro.conf.Positional[str | None] = None
    """Recipe, such as gpt2. None: totals of gpt2, gpt2-medium and gpt2-xl on H100 and H200."""
    gpu: Literal[tuple(LIMITS)] | None = None
    """GPU to predict for. None: this machine's if it is known, else h200."""
    batch_size: int | None = None
    """Sequences per optimizer step. None: the recipe's."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward. None: the recipe's, or fewer if the batch is smaller."""
    measure: int = 0
    """Also profile this many steps on this machine's device, and show them in the table."""
    one_pass: bool = False
    """Predict attention's backward in one pass where that fits the GPU. It is not the default."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""


# --- the prediction


def predict(plan: Plan, config: TrainConfig) -> dict[str, Any]:
    """Predict one step. Return the figures of the record.

    Args:
        plan: sizes of the step; its machine is one of LIMITS.
        config: the other options of the run.
    """
    limits = LIMITS[plan.machine.name]
    micro_batches = plan.sequences // plan.micro_batch
    model = replace(plan.model, context_tokens=plan.context_tokens)
    work = step_work(model, config, plan.micro_batch, micro_batches)
    rows = rows_of(work, limits)
    gpu_seconds = sum(row["seconds"] for row in rows)
    seconds = max(gpu_seconds, sum_host(work, "compiled"))
    tokens_per_second = plan.tokens_per_step / seconds
    flops = flops_per_token(model, plan.context_tokens) * tokens_per_second
    return {
        "gpu_name": plan.machine.name,
        "batch": plan.sequences,
        "micro_batch": plan.micro_batch,
        "context_tokens": plan.context_tokens,
        "limits": vars(limits),
        "seconds": seconds,
        "gpu_seconds": gpu_seconds,
        "floor_seconds": sum(row["floor_seconds"] for row in rows),
        "fusable_seconds": sum(row["seconds"] for row in rows if row["is_fusable"]),
        "host_seconds": {mode: sum_host(work, mode) for mode in HOST_SECONDS},
        "tokens_per_second": tokens_per_second,
        "mfu": flops / CEILINGS[plan.machine.name].bf16_flops,
        "parts": _sum_parts(rows),
        "rows": rows,
    }


def rows_of(work: Sequence[tuple[Work, int]], limits: Limits) -> list[dict[str, Any]]:
    """Add up equal pieces of work. Return a row for each, the longest first."""
    sums: dict[tuple, dict[str, Any]] = {}
    for piece, count in work:
        row, efficiency = efficiency_of(piece, limits)
        floor = floor_seconds(piece, limits)
        sizes = "x".join(map(str, piece.sizes))
        found = sums.setdefault(
            (piece.operators, piece.kernel, sizes, row.name),
            {
                "part": piece.part,
                "operator": piece.operators[-1],
                "kernel": f"{piece.kernel} {sizes}".strip(),
                "class": row.name,
                "is_fusable": piece.is_pointwise,
                **dict.fromkeys(("calls", "bytes", "flops", "floor_seconds", "seconds"), 0),
            },
        )
        found["calls"] += count
        found["bytes"] += count * piece.nbytes
        found["flops"] += count * piece.flops
        found["floor_seconds"] += count * floor
        found["seconds"] += count * (floor / efficiency + GAP_SECONDS)
    return sorted(sums.values(), key=lambda row: -row["seconds"])


def sum_host(work: Sequence[tuple[Work, int]], mode: str) -> float:
    """Return the seconds that the host needs to start all work: "compiled" or "eager"."""
    launch_seconds, aten_seconds = HOST_SECONDS[mode]
    return sum(
        count * (aten_seconds if piece.launch is None else launch_seconds) for piece, count in work
    )


def _sum_parts(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each part of the model, the longest first."""
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        sums[row["part"]] += row["seconds"]
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


# --- the measurement


def measure(plan: Plan, config: TrainConfig, steps: int) -> dict[str, Any]:
    """Train steps of the plan's sizes on this machine. Return the profile of the last `steps`.

    The tokens are random, as in `tritium bench train`.
    """
    # The model and its batches.
    device = choose_device("auto")
    choose_matmul(device)
    model = replace(plan.model, context_tokens=plan.context_tokens)
    # Without a CUDA graph, in which the profiler cannot tell which operator launched a kernel.
    options = {
        "micro_batch_size": plan.micro_batch,
        "batch_size": plan.sequences,
        "cuda_graph": "off",
    }
    config = config.with_options(**options, context_tokens=plan.context_tokens)
    compiled = compiles_on(device)
    torch.manual_seed(config.seed)
    trained = TrainedModel("tritium", GPT(model).to(device), config, compiled=compiled)
    sizes = config.with_options(micro_batch_size=plan.sequences)
    warmup = WARMUP_STEPS if device.type == "cuda" else 1
    batches = [random_batch(sizes, model, step) for step in range(warmup + steps)]

    # Warm up, then profile until the device is done.
    for batch in batches[:warmup]:
        trained.step(batch)
    trained.losses[-1].item()
    with torch.profiler.profile(activities=activities(device)) as profiler:
        for batch in batches[warmup:]:
            trained.step(batch)
        trained.losses[-1].item()
    rows = operators(profiler.events(), steps, device)
    return {
        "device": device.type,
        "compiled": compiled,
        "steps": steps,
        "seconds": sum(row.seconds for row in rows),
        "rows": [vars(row) for row in rows],
    }


def compare(predicted: Sequence[dict], measured: Sequence[dict]) -> list[dict[str, Any]]:
    """Return predicted and measured seconds by part and operator, the longest first.

    A row that only one of the two has is 0 in the other. torch.compile makes such kernels.
    """
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for name, rows in (("predicted", predicted), ("measured", measured)):
        for row in rows:
            key = row["part"], row["operator"]
            pair = pairs.setdefault(key, {"predicted": 0.0, "measured": 0.0})
            pair[name] += row["seconds"]
    found = [{"part": part, "operator": name, **pair} for (part, name), pair in pairs.items()]
    return sorted(found, key=lambda row: -max(row["measured"], row["predicted"]))


# --- the command


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench predict`. Returns: exit status."""
    about = "Estimate a training step, kernel by kernel. Nothing is measured without --measure."
    options = parse(PredictOptions, argv, prog="tritium bench predict", description=about)
    check_positive(options, "batch_size", "micro_batch_size")
    if options.measure < 0:
        raise InputError(f"--measure: expected 0 or more, got {options.measure}")
    if options.recipe is None and options != PredictOptions(
        one_pass=options.one_pass, out=options.out
    ):
        raise InputError(
            "--gpu, --batch-size, --micro-batch-size, --measure: expected a recipe with them"
        )
    out = check_writable(options.out)
    with backward_in("auto") if options.one_pass else nullcontext():
        steps = _all_steps() if options.recipe is None else [_one_step(options)]
    for step in steps:
        step["one_pass"] = options.one_pass
    if options.recipe is None:
        print(predict_table({"steps": steps}))
    else:
        _print_step(steps[0])
        if options.measure:
            _print_comparison(steps[0])
    if out:
        assumptions = {row.name: row.reason for row in EFFICIENCIES}
        write_record(out, "predict", {"assumptions": assumptions, "steps": steps})
    return 0


def _all_steps() -> list[dict[str, Any]]:
    """Predict the steps of STEPS on each GPU of LIMITS. Return them without their rows."""
    steps = []
    for name, batch, micro_batch in STEPS:
        for gpu in LIMITS:
            step = predict(*_plan(name, gpu, batch, micro_batch))
            del step["rows"]
            steps.append({"recipe": name, **step})
    return steps


def _one_step(options: PredictOptions) -> dict[str, Any]:
    """Predict the step of a recipe, and measure it if the options say so."""
    gpu = options.gpu or _this_gpu()
    plan, config = _plan(options.recipe, gpu, options.batch_size, options.micro_batch_size)
    step = {"recipe": options.recipe, **predict(plan, config)}
    if options.measure:
        step["measured"] = measure(plan, config, options.measure)
    return step


def _plan(
    name: str, gpu: str, batch: int | None, micro_batch: int | None
) -> tuple[Plan, TrainConfig]:
    """Return the sizes of a recipe's step, and its other options."""
    config = recipe(name)
    tokens = None if batch is None else str(batch * config.model.context_tokens)
    options = PlanOptions(
        recipe=name, gpu=gpu, tokens_per_step=tokens, micro_batch_size=micro_batch
    )
    return make_plan(options), config


def _this_gpu() -> str:
    """Return the row of LIMITS for this machine's GPU, or h200."""
    known = ceiling(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return next((name for name in LIMITS if CEILINGS[name] is known), "h200")


def _print_step(step: dict[str, Any]) -> None:
    console = table_console(160)
    table = Table("part", "operator", "kernel", "calls", "GB", "TFLOP", "floor ms", "efficiency")
    table.add_column("predicted ms")
    table.title = (
        f"ESTIMATE of a step: {step['recipe']} on {step['gpu_name']}, {step['batch']} x "
        f"{step['context_tokens']} tokens in micro-batches of {step['micro_batch']}"
        + ", backward of attention in one pass"
        * step["one_pass"]
    )
    small = [row for row in step["rows"] if row["seconds"] < SMALL_SHARE * step["gpu_seconds"]]
    for row in step["rows"]:
        if row not in small:
            table.add_row(*_cells(row))
    if small:
        names = ("calls", "bytes", "flops", "floor_seconds", "seconds")
        sums = {name: sum(row[name] for row in small) for name in names}
        table.add_row(*_cells({"part": "", "operator": f"{len(small)} others", **sums}))
    console.print(table)
    for part, seconds in step["parts"].items():
        print(f"  {part:12} {1e3 * seconds:9.2f} ms  {seconds / step['gpu_seconds']:6.1%}")
    host = step["host_seconds"]
    print(
        f"GPU {1e3 * step['gpu_seconds']:.1f} ms (floor {1e3 * step['floor_seconds']:.1f}), host "
        f"{1e3 * host['compiled']:.1f} ms compiled, {1e3 * host['eager']:.1f} ms eager, at the "
        f"same time\n"
        f"ESTIMATE: {1e3 * step['seconds']:.1f} ms per step, {step['tokens_per_second']:,.0f} "
        f"tokens/s, MFU {step['mfu']:.1%}\n"
        f"*: elementwise, {1e3 * step['fusable_seconds']:.2f} ms; torch.compile would fuse some. "
        "Efficiencies:"
    )
    used = {row["class"] for row in step["rows"]}
    for row in EFFICIENCIES:
        if row.name in used:
            print(f"  {row.name}: {row.reason}")


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the table on the screen."""
    flops = row["flops"] / 1e12
    return [
        row["part"],
        row["operator"] + " *" * row.get("is_fusable", False),
        row.get("kernel", ""),
        f"{row['calls']:,}",
        f"{row['bytes'] / 1e9:,.2f}",
        f"{flops:,.2f}" if flops else "",
        f"{1e3 * row['floor_seconds']:.2f}",
        f"{row['floor_seconds'] / row['seconds']:.0%}",
        f"{1e3 * row['seconds']:.2f}",
    ]


def _print_comparison(step: dict[str, Any]) -> None:
    """Print the measured profile next to the prediction, first by part, then by operator."""
    measured = step["measured"]
    where = "this GPU" if measured["device"] == "cuda" else "this CPU: NO GPU WAS MEASURED"
    console = table_console(160)
    rows = compare(step["rows"], measured["rows"])
    parts: dict[str, dict[str, Any]] = {}
    for row in rows:
        part = parts.setdefault(
            row["part"], {"part": row["part"], "operator": "", "predicted": 0.0, "measured": 0.0}
        )
        part["predicted"] += row["predicted"]
        part["measured"] += row["measured"]
    for title, chosen in (("parts", list(parts.values())), ("operators", rows)):
        table = Table("part", "operator", "predicted ms", "measured ms", "measured / predicted")
        table.title = (
            f"{title}: measured on {where}; !: off by more than {TOLERANCE:.0%}, or one is missing"
        )
        for row in chosen:
            if max(row["measured"], row["predicted"]) >= SMALL_SHARE * measured["seconds"]:
                table.add_row(*_comparison_cells(row))
        console.print(table)
    print(
        f"measured: {1e3 * measured['seconds']:.1f} ms per step; "
        f"predicted: {1e3 * step['seconds']:.1f} ms"
    )


def _comparison_cells(row: dict[str, Any]) -> list[str]:
    predicted, measured = row["predicted"], row["measured"]
    cells = [f"{1e3 * seconds:.2f}" if seconds else "-" for seconds in (predicted, measured)]
    if not (predicted and measured):
        return [row["part"], row["operator"], *cells, "- !"]
    ratio = measured / predicted
    mark = "" if abs(ratio - 1) <= TOLERANCE else " !"
    return [row["part"], row["operator"], *cells, f"{ratio:.2f}{mark}"]
