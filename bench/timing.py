"""Time calls fairly: in turn, with inputs out of the cache, as medians with their spread.

On a GPU a sample is a run of calls between two events, long enough that the host stays ahead. Each
call uses the next of several sets of inputs, which together are larger than the L2 cache. On a CPU
a sample is one call.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

# A shorter run of calls on a GPU would be mostly the host's time.
RUN_SECONDS = 2e-3
MAX_CALLS = 200


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile of samples."""
    p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def time_in_turn(
    calls: dict[str, Callable[[int], object]], device: torch.device, *, rounds: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time several calls in turn, so that all meet the same clocks and temperatures.

    Args:
        calls: name -> function of the number of the input set: 0, 1, 2 ...
        device: where the calls run.
        rounds: samples per call. Each round takes one sample of each.
        warmup: runs of each call before the first sample.
    Returns: name -> summary of the seconds per call.
    """
    run = _gpu_run if device.type == "cuda" else _cpu_run
    counts = {}
    for name, call in calls.items():
        for number in range(warmup):
            call(number)
        counts[name] = 1
        if device.type == "cuda":
            counts[name] = min(MAX_CALLS, max(1, round(RUN_SECONDS / run(call, 1))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(run(call, counts[name]))
    return {name: summary(samples) for name, samples in seconds.items()}


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """Return how many sets of inputs together are twice as large as the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, -(-2 * cache // max(1, bytes_per_set)))


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the limits of a machine with random numbers.

    Returns: bytes_per_second of a copy far larger than the caches, counting reads and writes, and
        flops_per_second of a large square matmul.
    """
    n, side, rounds = (1 << 28, 8192, 10) if device.type == "cuda" else (1 << 24, 1024, 5)
    source = torch.randn(n, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    calls = {"copy": lambda _: target.copy_(source), "matmul": lambda _: torch.mm(a, b)}
    times = time_in_turn(calls, device, rounds=rounds)
    return {
        "bytes_per_second": 2 * source.nbytes / times["copy"]["median"],
        "flops_per_second": 2 * side**3 / times["matmul"]["median"],
    }


def _gpu_run(call: Callable[[int], object], count: int) -> float:
    """Return seconds per call of `count` calls between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for number in range(count):
        call(number)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def _cpu_run(call: Callable[[int], object], count: int) -> float:
    """Return seconds per call of `count` calls on the clock."""
    began = time.perf_counter()
    for number in range(count):
        call(number)
    return (time.perf_counter() - began) / count
