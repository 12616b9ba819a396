"""Threads of the CPU: how many a process uses, and whether they get the cores that they need.

PyTorch starts one thread per core of the machine. In a container with a limit on CPU time the
threads then wait for each other at each operator. If other programs use the cores, the same
happens: on two cores shared with several programs, a step with two threads took twice as long as
with one (November 2026).
"""

import math
import os
import time
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
# CoreTime judges after so many seconds of steps.
_JUDGED_SECONDS = 10.0
# Threads that get less than this fraction of their cores wait for each other most of the time. A
# process alone on its cores gets 0.8 to 1.0: threads without work wait in a loop.
_LEAST_FRACTION = 0.5


def limit_threads(cgroups: Path = _CGROUPS) -> None:
    """Use no more threads than the CPU time that the container has, unless the user chose."""
    limit = cpu_limit(cgroups)
    if "OMP_NUM_THREADS" in os.environ or limit is None:
        return
    threads = max(1, math.ceil(limit))
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)


def cpu_limit(cgroups: Path = _CGROUPS) -> float | None:
    """Return the number of cores that the container may use at once; None without a limit."""
    try:
        if (cgroups / "cpu.max").is_file():  # version 2: "200000 100000" is two cores
            quota, period = (cgroups / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        cores = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return cores if cores > 0 else None  # version 1: -1 is no limit


class CoreTime:
    """Notices that other programs use the cores.

    Args:
        threads: threads of this process that compute.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._seconds = 0.0
        self._core_seconds = 0.0
        self._began: tuple[float, float] | None = None
        self.start()

    def start(self) -> None:
        """Begin a time span."""
        self._began = (time.perf_counter(), time.process_time())

    def end(self) -> str | None:
        """End the time span. Returns: a warning, at most once; else None."""
        now = (time.perf_counter(), time.process_time())
        self._seconds += now[0] - self._began[0]
        self._core_seconds += now[1] - self._began[1]
        self._began = now
        if self._threads < 2 or self._seconds < _JUDGED_SECONDS:
            return None
        fraction = self._core_seconds / self._seconds / self._threads
        threads, self._threads = self._threads, 1
        if fraction >= _LEAST_FRACTION:
            return None
        return (
            f"{threads} threads got {fraction:.0%} of the time of {threads} cores: other programs "
            "use them. Fewer threads may be faster: set OMP_NUM_THREADS=1 and resume the run"
        )
