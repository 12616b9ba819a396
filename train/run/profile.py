"""Where a step's time goes: a few steps of a run under PyTorch's profiler.

    RUN/profile/trace.json.gz      every operator and kernel on a time line, for ui.perfetto.dev or chrome://tracing
    RUN/profile/operators.txt      milliseconds a step and share of each part of a step, and of each operator in it

Times on CUDA are those of the kernels that an operator launched, elsewhere an operator's own, without the ones that it calls. A
part has all that runs inside one of its operators, in forward and backward. What is left of the steps, when nothing ran, is a
row too: on CUDA the device was idle, on a CPU Python was between operators.
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
from ..files import write_whole
from .metrics import Metrics, console

# Steps before those that are profiled: the first ones compile, and allocate what later ones find.
WARMUP_STEPS = 10
BETWEEN = "between operators"
# The first that fits the name of an operator, of its backward's node or of a kernel.
PARTS = {
    "data": r"^data$|pin_memory|Memcpy HtoD",
    "optimizer": r"^Optimizer\.|_foreach_|_fused_adam|vector_norm|_amp_",
    "head + loss": r"cross_entropy|nll_loss|log_softmax",
    "attention": r"attention|flash_attn|rotary|ScaledDotProduct",
    "norms": r"(layer|rms)_?norm",
    "perceptron": r"gelu|swiglu|silu",
    "products": r"\b(add|b)?mm\b|aten::linear|(Addmm|Mm)Backward|gemm|nvjet|cutlass",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """An operator's time: seconds and calls a step, share of the steps' duration; calls are None where nothing ran."""

    part: str
    operator: str
    seconds: float
    share: float
    calls: float | None


def first_profiled(config: TrainConfig, first: int = 0) -> int | None:
    """Where `profile` steps in a row, after warming up, begin which no evaluation or checkpoint interrupts; None: nowhere.

    Args:    first: step that this process begins with.
    """
    if not config.report.profile:
        return None
    for begin in range(first + WARMUP_STEPS, config.steps - config.report.profile):
        inside = range(begin, begin + config.report.profile + 1)
        if all(
            -begin % interval + begin not in inside
            for interval in (config.report.eval_interval, config.report.checkpoint_interval)
        ):
            return begin
    return None


def check_profile_steps(config: TrainConfig) -> None:
    """Raise InputError if a new run has no steps that `profile` can watch."""
    if config.report.profile and first_profiled(config) is None:
        raise InputError(
            f"profile: expected {config.report.profile} steps in a row, after the first {WARMUP_STEPS}, without evaluation or "
            "checkpoint, found none; give a smaller `profile`, or more `steps`, `eval_interval` or `checkpoint_interval`"
        )


def profiled(
    steps: range,
    config: TrainConfig,
    run: Path,
    metrics: Metrics,
    device: torch.device,
    world: World = SINGLE_PROCESS,
) -> Iterator[int]:
    """Yield the steps; the first rank is watched in `profile` of them. A run's profile is made once, though resumed."""
    begin, folder = first_profiled(config, steps.start), run / "profile"
    done = folder / "operators.txt"
    if begin is None or not world.is_rank0 or done.exists():
        yield from steps
        return
    yield from range(steps.start, begin)
    # What has to be set up and written is in no step's rate.
    with metrics.paused():
        watch = torch.profiler.profile(activities=activities(device))
        watch.start()
    try:
        yield from range(begin, begin + config.report.profile)
        metrics.flush()  # which waits for the last of these steps
    finally:
        watch.stop()
    with metrics.paused():
        rows = operators(watch.events(), config.report.profile, device)
        parts = _table_of_parts(rows, f"steps {begin} to {begin + config.report.profile - 1}")
        folder.mkdir(exist_ok=True)
        watch.export_chrome_trace(str(folder / "trace.json.gz"))
        # Last: it says that the profile is there.
        write_whole(done, ["\n".join([*parts, "", *_table(rows), ""]).encode()])
        console.print("\n".join([*parts, f"profile: {folder}"]), markup=False)
    yield from range(begin + config.report.profile, steps.stop)


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What a profiler has to watch."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def operators(events: Sequence, steps: int, device: torch.device) -> list[Row]:
    """Times of each operator in each part, the longest first; see the top of this file.

    Args:    events: of a profiler that watched `steps` steps, the device done with them.
    """
    times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])

    def add(part: str, operator: str, microseconds: float) -> None:
        total = times[part, operator]
        total[0] += microseconds
        total[1] += 1

    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    if device.type != "cuda":
        for event in on_cpu:
            add(_part_of(event), event.name, event.self_cpu_time_total)
    else:
        # Spans that a user named have a shadow among the kernels.
        named = {event.name for event in events if event.is_user_annotation}
        unseen: dict[str, list[float]] = defaultdict(list)
        for event in events:
            if event.device_type != DeviceType.CPU and event.name not in named:
                unseen[event.name].append(event.time_range.elapsed_us())
        for event in on_cpu:
            for kernel in event.kernels:
                if unseen.get(kernel.name):
                    add(_part_of(event, kernel.name), event.name, kernel.duration)
                    unseen[kernel.name].pop()
        # Compiled code launches kernels outside of any operator.
        for name, left in unseen.items():
            for microseconds in left:
                add(_part(name) or "other", name, microseconds)
    ends = [(event.time_range.start, event.time_range.end) for event in events]
    whole = max(end for _, end in ends) - min(start for start, _ in ends) if ends else 0.0
    idle = max(0.0, whole - sum(time for time, _ in times.values()))
    rows = [
        (part, operator, time, calls / steps) for (part, operator), (time, calls) in times.items()
    ]
    rows = sorted([*rows, (BETWEEN, "", idle, None)], key=lambda row: row[2], reverse=True)
    total = sum(row[2] for row in rows) or 1.0
    return [
        Row(
            part=part,
            operator=operator,
            seconds=time / 1e6 / steps,
            share=time / total,
            calls=calls,
        )
        for part, operator, time, calls in rows
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [f"{'operator by operator':64}{'ms a step':>10}{'share':>8}{'calls a step':>14}"]
    for row in rows:
        calls = "" if row.calls is None else f"{row.calls:.0f}"
        lines.append(
            f"{row.part:18}{row.operator:46.45}{1e3 * row.seconds:10.3f}{row.share:8.1%}{calls:>14}"
        )
    return lines


def _table_of_parts(rows: Sequence[Row], title: str) -> list[str]:
    sums = {part: [0.0, 0.0] for part in dict.fromkeys(row.part for row in rows)}
    for row in rows:
        sums[row.part][0] += row.seconds
        sums[row.part][1] += row.share
    longest_first = sorted(sums.items(), key=lambda item: -item[1][0])
    lines = [
        f"{part:24}{1e3 * seconds:10.3f}{share:8.1%}" for part, (seconds, share) in longest_first
    ]
    return [f"{title:24}{'ms a step':>10}{'share':>8}", *lines]


def _part(name: str) -> str | None:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), None)


def _part_of(event, kernel: str = "") -> str:
    """Of the outermost operator around an event that belongs to one."""
    part = _part(kernel)
    while event is not None:
        part = _part(event.name) or part
        event = event.cpu_parent
    return part or "other"
