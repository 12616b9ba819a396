"""How long a call takes, measured fairly: contestants in turn, inputs out of the cache, medians and their spread.

On a GPU a sample is a run of calls between two events, long enough that the host stays ahead; each call gets the next of
several input sets, which together are larger than the L2 cache. On a CPU a sample is one call on a clock.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# A run of calls shorter than this on the GPU is mostly the host's time.
RUN_SECONDS = 2e-3
MAX_CALLS = 200


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds of one call: median, and the tenth and ninetieth hundredth of the samples."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine reaches: bytes a second of a copy, reads and writes counted, and FLOPs a second of a large product."""

    bytes_per_second: float
    flops_per_second: float


def summary(seconds: Sequence[float]) -> Sample:
    """Median and spread of samples."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Sample(
        median=statistics.median(ordered),
        p10=ordered[round(0.1 * last)],
        p90=ordered[round(0.9 * last)],
    )


def time_in_turn(
    calls: dict[str, Callable[[int], object]], device: torch.device, *, rounds: int, warmup: int = 3
) -> dict[str, Sample]:
    """Time calls against one another.

    Args:
        calls: name -> function of the number of the input set to use; called with 0, 1, 2 ...
        device: where they run.
        rounds: samples of each; in each round every contestant has its turn.
        warmup: calls of each before the first sample.
    """
    take = _gpu_run if device.type == "cuda" else _cpu_run
    counts = {}
    for name, call in calls.items():
        for number in range(warmup):
            call(number)
        once = take(call, 1)
        counts[name] = (
            1 if device.type == "cpu" else min(MAX_CALLS, max(1, round(RUN_SECONDS / once)))
        )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(take(call, counts[name]))
    return {name: summary(samples) for name, samples in seconds.items()}


def input_sets(bytes_a_set: int, device: torch.device) -> int:
    """How many sets of inputs are together at least twice as large as the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, -(-2 * cache // max(1, bytes_a_set)))


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the machine: a copy far larger than its caches, and a square matrix product, of random numbers."""
    n, side, rounds = (1 << 28, 8192, 10) if device.type == "cuda" else (1 << 24, 1024, 5)
    source = torch.randn(n, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy = time_in_turn({"copy": lambda _: target.copy_(source)}, device, rounds=rounds)["copy"]
    product = time_in_turn({"product": lambda _: torch.mm(a, b)}, device, rounds=rounds)["product"]
    return Ceilings(
        bytes_per_second=2 * source.numel() * source.itemsize / copy.median,
        flops_per_second=2 * side**3 / product.median,
    )


def _gpu_run(call: Callable[[int], object], count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for number in range(count):
        call(number)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def _cpu_run(call: Callable[[int], object], count: int) -> float:
    began = time.perf_counter()
    for number in range(count):
        call(number)
    return (time.perf_counter() - began) / count
