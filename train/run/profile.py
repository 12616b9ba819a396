"""Profile a few steps of a run with PyTorch's profiler.

    RUN/profile/trace.json.gz      operators and kernels over time, for ui.perfetto.dev
    RUN/profile/operators.txt      milliseconds per step, per part of a step and per operator

On CUDA, the time of an operator is the time of the kernels that it launched. On other devices it is
the operator's own time, without the operators that it calls. Each operator counts in one part of a
step: of all operators around it that match a pattern of PARTS, the outermost decides. Parts include
forward and backward. The rest of the steps' duration is the row "between operators": on CUDA the
device was idle, on a CPU Python ran.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from ...errors import InputError
from ..config import TrainConfig
from ..distributed.world import SINGLE_PROCESS, World
from ..storage.files import write_whole
from ..terminal.progress import console
from .metrics import Metrics

# Steps before the profiled ones. The first steps compile, and allocate memory.
WARMUP_STEPS = 10
BETWEEN = "between operators"
OTHER = "other"
# Part of a step -> pattern for names of operators, backward nodes and kernels. First match wins.
PARTS = {
    "data": r"^data$|pin_memory|Memcpy HtoD",
    "optimizer": r"^Optimizer\.|_foreach_|_fused_adam|vector_norm|_amp_",
    "embedding": r"embedding",
    "head + loss": r"cross_entropy|nll_loss|log_softmax",
    "attention": r"attention|flash_attn|rotary|ScaledDotProduct",
    "norms": r"(layer|rms)_?norm",
    "MLP": r"gelu|swiglu|silu",
    "matmul": r"\b(add|b)?mm\b|aten::linear|(Addmm|Mm)Backward|gemm|nvjet|cutlass",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The time of one operator in one part of a step."""

    part: str
    operator: str
    seconds: float
    """Per step."""
    share: float
    """Fraction of the steps' duration."""
    calls: float | None
    """Per step. None for the time between operators."""


def first_profiled(config: TrainConfig, first: int = 0) -> int | None:
    """Return the first step to profile, or None.

    After WARMUP_STEPS, `config.report.profile` consecutive steps are profiled, without an
    evaluation or checkpoint between them.

    Args:
        config: the run.
        first: first step of this process.
    """
    report = config.report
    if not report.profile:
        return None
    for begin in range(first + WARMUP_STEPS, config.steps - report.profile):
        end = begin + report.profile
        intervals = (report.eval_interval, report.checkpoint_interval)
        # The next multiple of the interval, from `begin` on, must come after `end`.
        if all(begin + -begin % interval > end for interval in intervals):
            return begin
    return None


def check_profile_steps(config: TrainConfig) -> None:
    """Raise InputError if a new run has no steps that `profile` can use."""
    if config.report.profile and first_profiled(config) is None:
        raise InputError(
            f"profile: expected {config.report.profile} steps in a row, after the first "
            f"{WARMUP_STEPS}, without evaluation or checkpoint, found none; give a smaller "
            "`profile`, or more `steps`, `eval_interval` or `checkpoint_interval`"
        )


def profiled(
    steps: range,
    config: TrainConfig,
    run: Path,
    metrics: Metrics,
    device: torch.device,
    world: World = SINGLE_PROCESS,
) -> Iterator[int]:
    """Yield the steps. Rank 0 profiles some of them, unless the run has a profile already."""
    begin = first_profiled(config, steps.start)
    folder = run / "profile"
    table = folder / "operators.txt"
    if begin is None or not world.is_rank0 or table.exists():
        yield from steps
        return
    end = begin + config.report.profile
    yield from range(steps.start, begin)

    # profile
    with metrics.paused("setup"):  # the rates exclude the profiler's setup and output
        profiler = torch.profiler.profile(activities=activities(device))
        profiler.start()
    try:
        yield from range(begin, end)
        metrics.flush()  # waits for the device
    finally:
        profiler.stop()

    # write
    with metrics.paused("setup"), world.patient():
        rows = operators(profiler.events(), config.report.profile, device)
        parts = _table_of_parts(rows, f"steps {begin} to {end - 1}")
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        # Written last: its existence says that the profile is complete.
        write_whole(table, ["\n".join([*parts, "", *_table(rows), ""]).encode()])
        console.print("\n".join([*parts, f"profile: {folder}"]), markup=False)
    yield from range(end, steps.stop)


def activities(device: torch.device) -> list[ProfilerActivity]:
    """Return the activities that a profiler has to record on `device`."""
    if device.type == "cuda":
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    return [ProfilerActivity.CPU]


def operators(events: Sequence, steps: int, device: torch.device) -> list[Row]:
    """Return the time of each operator in each part, longest first.

    Args:
        events: the events of a profiler that recorded `steps` steps, until the device was done.
        steps: number of steps.
        device: the device that ran them.
    """
    times = _cuda_times(events) if device.type == "cuda" else _cpu_times(events)
    duration = 0.0
    if events:
        starts = [event.time_range.start for event in events]
        ends = [event.time_range.end for event in events]
        duration = max(ends) - min(starts)
    between = max(0.0, duration - sum(sum(each) for each in times.values()))
    total = sum(sum(each) for each in times.values()) + between or 1.0

    def row(part: str, operator: str, microseconds: float, calls: float | None) -> Row:
        return Row(
            part=part,
            operator=operator,
            seconds=microseconds / 1e6 / steps,
            share=microseconds / total,
            calls=calls,
        )

    rows = [
        row(part, operator, sum(each), len(each) / steps)
        for (part, operator), each in times.items()
    ]
    rows.append(row(BETWEEN, "", between, None))
    return sorted(rows, key=lambda row: row.seconds, reverse=True)


def _cpu_times(events: Sequence) -> dict[tuple[str, str], list[float]]:
    """Microseconds of each call, by part and operator."""
    times = defaultdict(list)
    for event in events:
        if event.device_type == DeviceType.CPU:
            times[_part_of(event), event.name].append(event.self_cpu_time_total)
    return times


def _cuda_times(events: Sequence) -> dict[tuple[str, str], list[float]]:
    """Microseconds of each kernel, by part and operator."""
    times = defaultdict(list)
    # The list of kernels also has the named ranges of record_function.
    annotations = {event.name for event in events if event.is_user_annotation}
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type != DeviceType.CPU and event.name not in annotations:
            kernels[event.name].append(event.time_range.elapsed_us())

    # kernels that an operator launched
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        for kernel in event.kernels:
            if kernels.get(kernel.name):
                times[_part_of(event, kernel.name), event.name].append(kernel.duration)
                kernels[kernel.name].pop()

    # kernels that compiled code launched outside of an operator
    for name, durations in kernels.items():
        if durations:
            times[part_of_name(name) or OTHER, name].extend(durations)
    return times


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [f"{'operators':64}{'ms/step':>10}{'share':>8}{'calls/step':>14}"]
    for row in rows:
        calls = "" if row.calls is None else f"{row.calls:.0f}"
        milliseconds = 1e3 * row.seconds
        lines.append(
            f"{row.part:18}{row.operator:46.45}{milliseconds:10.3f}{row.share:8.1%}{calls:>14}"
        )
    return lines


def _table_of_parts(rows: Sequence[Row], title: str) -> list[str]:
    seconds = defaultdict(float)
    shares = defaultdict(float)
    for row in rows:
        seconds[row.part] += row.seconds
        shares[row.part] += row.share
    lines = [f"{title:24}{'ms/step':>10}{'share':>8}"]
    for part in sorted(seconds, key=seconds.get, reverse=True):
        lines.append(f"{part:24}{1e3 * seconds[part]:10.3f}{shares[part]:8.1%}")
    return lines


def part_of_name(name: str) -> str | None:
    """Return the part of a step that a name of an operator or kernel matches, or None."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), None)


def _part_of(event, kernel: str = "") -> str:
    """Return the part of the outermost operator around `event` that has one, or the kernel's."""
    part = part_of_name(kernel)
    while event is not None:
        part = part_of_name(event.name) or part
        event = event.cpu_parent
    return part or OTHER
