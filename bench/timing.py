"""Time calls fairly: in turn, with inputs out of the cache, as medians with their spread.

On a GPU a sample is a run of calls between two events. Python needs about 100 us to start an
operator, and many kernels take less. So the host's time must not be part of a sample:

    cuda graph   The run is captured once. Each sample replays it, and no Python runs in between.
    backlog      For calls that cannot be captured, such as calls that wait for the device. The GPU
                 sleeps until the host has started the whole run.

Each call uses the next of several sets of inputs, which together are larger than the L2 cache. On a
CPU a sample is one call, timed with the host's clock.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import cuda

Call = Callable[[int], object]
"""Function of the number of the input set: 0, 1, 2 ..."""

# The gaps around a run, a few microseconds, are then much less than 1 % of a sample.
RUN_SECONDS = 2e-3
MAX_CALLS = 200
# The driver queues about 1,000 launches. An eager operator can have 20 per call.
MAX_BACKLOG_CALLS = 20
# A call that waits for the device would make the host's time, and so the sleep, as long as the run.
MAX_SLEEP_SECONDS = 50e-3
# torch.cuda._sleep counts clocks. GPUs of 2020 to 2025 run at up to 3 GHz. The sleep is too long
# on a slower GPU, which does no harm.
CLOCKS_PER_SECOND = 3e9


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of calls that is timed as one sample.

    Attributes:
        start: starts all calls of the run.
        calls: number of calls.
        timed_by: "cuda graph", "backlog" or "host clock".
        sleep_seconds: how long the GPU sleeps before the run.
        graph: the captured run, if there is one.
    """

    start: Callable[[], object]
    calls: int
    timed_by: str
    sleep_seconds: float = 0.0
    graph: Any = None


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile of samples."""
    p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def time_in_turn(
    calls: dict[str, Call], device: torch.device, *, rounds: int, warmup: int = 3
) -> dict[str, dict[str, Any]]:
    """Time several calls in turn, so that all meet the same clocks and temperatures.

    On a GPU the calls run on `side_stream`. A backward runs on the stream of its forward: if a call
    only runs a backward, its forward must have run on `side_stream` too.

    Args:
        calls: name -> function of the number of the input set: 0, 1, 2 ...
        device: where the calls run.
        rounds: samples per call. Each round takes one sample of each.
        warmup: runs of each call before the first sample.
    Returns: name -> summary of the seconds per call, and "timed_by": how they were measured.
    """
    if device.type != "cuda":
        for call in calls.values():
            for number in range(warmup):
                call(number)
        clocked = {name: _clocked(call) for name, call in calls.items()}
        return _sample_in_turn(clocked, _host_seconds, rounds)
    with side_stream(device) as stream:
        runs: dict[str, Run] = {}
        try:
            pool = cuda.graph_pool_handle()
            for name, call in calls.items():
                runs[name] = _gpu_run(call, warmup, stream, pool)
                if runs[name].graph is None:
                    # PyTorch may still allocate from the pool of a capture that failed.
                    pool = cuda.graph_pool_handle()
            return _sample_in_turn(runs, _gpu_seconds, rounds)
        finally:
            for run in runs.values():
                if run.graph is not None:
                    run.graph.reset()
            # Return the memory of the graphs to the device.
            cuda.empty_cache()


def _sample_in_turn(
    runs: dict[str, Run], seconds_of: Callable[[Run], float], rounds: int
) -> dict[str, dict[str, Any]]:
    """Take `rounds` samples of each run, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run) / run.calls)
    return {
        name: {**summary(samples), "timed_by": runs[name].timed_by}
        for name, samples in seconds.items()
    }


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """Return how many sets of inputs together are twice as large as the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = cuda.get_device_properties(device).L2_cache_size
    return min(64, -(-2 * cache // max(1, bytes_per_set)))


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the limits of a machine with random numbers.

    Returns: bytes_per_second of a kernel that copies a tensor far larger than the caches with the
        opposite sign, counting reads and writes, and flops_per_second of a large square matmul.
        copy_() is not used. In a CUDA graph it is a copy node, not a kernel, and slower: 2.8 TB/s
        on an H200, where the kernels of cross_entropy reached 3.9 (November 2026).
    """
    n, side, rounds = (1 << 28, 8192, 10) if device.type == "cuda" else (1 << 24, 1024, 5)
    source = torch.randn(n, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    calls = {"copy": lambda _: torch.neg(source, out=target), "matmul": lambda _: torch.mm(a, b)}
    times = time_in_turn(calls, device, rounds=rounds)
    return {
        "bytes_per_second": 2 * source.nbytes / times["copy"]["median"],
        "flops_per_second": 2 * side**3 / times["matmul"]["median"],
    }


# --- CPU


def _clocked(call: Call) -> Run:
    return Run(start=lambda: call(0), calls=1, timed_by="host clock")


def _host_seconds(run: Run) -> float:
    """Return the seconds of a run on the host's clock."""
    began = time.perf_counter()
    run.start()
    return time.perf_counter() - began


# --- GPU


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[cuda.Stream | None]:
    """Make the stream of all measurements the current one. Does nothing on a CPU.

    The default stream cannot be captured. Autograd remembers the stream on which a tensor was first
    used, so everything around a measurement must run on the same stream.
    """
    if device.type != "cuda":
        yield None
        return
    stream = _stream(device)
    with cuda.device(device):
        cuda.synchronize()
        # After a failed capture this restores the stream.
        with cuda.stream(stream):
            yield stream
        cuda.synchronize()


@functools.cache
def _stream(device: torch.device) -> cuda.Stream:
    return cuda.Stream(device)


def _gpu_run(call: Call, warmup: int, stream: cuda.Stream, pool: Any) -> Run:
    """Warm up, choose the number of calls, and capture them if possible."""
    # PyTorch asks for at least three calls on the stream before a capture.
    for number in range(max(3, warmup)):
        call(number)
    cuda.synchronize()
    one = _behind_backlog(call, 1)
    calls = max(1, round(RUN_SECONDS / _gpu_seconds(one)))
    graph = None if _waits(call) else _capture(call, min(calls, MAX_CALLS), stream, pool)
    if graph is None:
        return _behind_backlog(call, min(calls, MAX_BACKLOG_CALLS))
    return Run(
        start=graph.replay,
        calls=min(calls, MAX_CALLS),
        timed_by="cuda graph",
        sleep_seconds=_sleep_for(graph.replay),
        graph=graph,
    )


def _waits(call: Call) -> bool:
    """Return whether a call waits for the device, as far as PyTorch notices it.

    A capture would fail. PyTorch 2.11 does not release all memory of a failed capture.
    """
    cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError:
        return True
    finally:
        cuda.set_sync_debug_mode("default")
    return False


def _capture(call: Call, calls: int, stream: cuda.Stream, pool: Any) -> Any:
    """Capture a run of calls. Returns: the graph, or None if it cannot be captured.

    The graphs share the memory of `pool`: a run keeps none of its results.
    """
    graph = cuda.CUDAGraph()
    try:
        with cuda.graph(graph, pool=pool, stream=stream):
            for number in range(calls):
                call(number)
    except RuntimeError:
        return None
    graph.replay()  # the first replay uploads the graph
    return graph


def _behind_backlog(call: Call, calls: int) -> Run:
    """Return a run that the host starts while the GPU sleeps."""

    def start() -> None:
        for number in range(calls):
            call(number)

    return Run(start=start, calls=calls, timed_by="backlog", sleep_seconds=_sleep_for(start))


def _sleep_for(start: Callable[[], object]) -> float:
    """Return how long the GPU must sleep until the host has started a run."""
    cuda.synchronize()
    began = time.perf_counter()
    start()
    # Twice, because the host's time varies.
    return min(MAX_SLEEP_SECONDS, 2 * (time.perf_counter() - began))


def _gpu_seconds(run: Run) -> float:
    """Return the seconds of a run between two events that the GPU reaches after a sleep."""
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda.synchronize()
    cuda._sleep(round(run.sleep_seconds * CLOCKS_PER_SECOND))
    begin.record()
    run.start()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
