"""Goodput: how a run divides its wall time, over all of its processes.

steps          forward, backward, update
data_wait      waiting for a batch
evaluation     evaluations, samples and the plot
checkpoints    the steps wait while a checkpoint is written
compilation    the first step of each process on CUDA or with torch.compile
setup          from the start of the first process, or of the call from Python, to its first step
restarts       steps that a resumed process takes again, because the process before it died
               after its newest checkpoint; going back to a checkpoint; and from the start of a
               resumed process to its first step
"""

import contextlib
import os
import time
from collections.abc import Iterator

PHASES = (
    "steps",
    "data_wait",
    "evaluation",
    "checkpoints",
    "compilation",
    "setup",
    "restarts",
)


class Goodput:
    """Adds up the seconds of each phase. At any time the run is in one phase.

    Args:
        before: seconds of each phase in earlier processes. Default: this process is the first.
    Attributes:
        seconds: seconds of each phase, up to the last change of the phase.
    """

    def __init__(self, before: dict[str, float] | None = None):
        self.seconds = dict.fromkeys(PHASES, 0.0) | (before or {})
        self._phase = "setup" if before is None else "restarts"
        self.seconds[self._phase] += process_age()
        self._since = time.perf_counter()

    def begin(self, phase: str) -> str:
        """Enter a phase. Returns: the phase before."""
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._since = now
        before = self._phase
        self._phase = phase
        return before

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the time inside as `phase`, then return to the phase before."""
        before = self.begin(phase)
        yield
        self.begin(before)

    def record(self) -> dict:
        """Return the wall time and the fraction of each phase, for metrics.jsonl."""
        self.begin(self._phase)
        total = sum(self.seconds.values())
        shares = {phase: seconds / total for phase, seconds in self.seconds.items()}
        return {"time": time.time(), "wall_seconds": total, "goodput": shares}


def seconds_before(line: dict, lost: float) -> dict[str, float]:
    """Return the seconds of each phase in earlier processes.

    Args:
        line: `record` of the checkpoint from which the run is resumed.
        lost: seconds of the steps after this checkpoint, which are taken again.
    """
    seconds = {phase: line["goodput"].get(phase, 0.0) * line["wall_seconds"] for phase in PHASES}
    seconds["restarts"] += lost
    return seconds


def describe(line: dict) -> str:
    """Describe what `record` returned in one line."""
    shares = line["goodput"]
    others = [
        f"{phase.replace('_', ' ')} {share:.1%}"
        for phase, share in shares.items()
        if phase != "steps" and share >= 0.0005
    ]
    return f"{shares['steps']:.1%} of {line['wall_seconds']:.0f} s in steps; " + ", ".join(others)


# When the call from Python began. None: the process is a command, which began when it started.
_began: float | None = None


def begin_now() -> None:
    """Count the time of runs from now on: from Python, the process may be hours old."""
    global _began
    _began = time.perf_counter()


def process_age() -> float:
    """Return the seconds since `begin_now`, or else since this process started.

    Returns: 0 if the system does not tell when the process started.
    """
    if _began is not None:
        return time.perf_counter() - _began
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            started = int(file.read().rpartition(")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return max(0.0, since_boot - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
