"""The metrics of a run: RUN/metrics.jsonl, the progress bar, and the lines in the terminal."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError, names_file, plural
from ..distributed.world import SINGLE_PROCESS, World
from ..evaluate import Evaluation
from ..machine.gpus import ceiling
from ..machine.threads import CoreTime
from ..optimizer.bad_steps import OVERFLOWED
from ..storage.files import write_whole
from ..terminal.progress import console, has_bars, progress_bars, task_of
from .goodput import Goodput, describe, seconds_before
from .lines import parse_line
from .trackers import Tracker

# Number of steps whose results are read from the device at once. On CUDA the newest step is left
# for the next read, so that the device has work while the host waits for the steps before it.
STEPS_PER_READ = 10
# Number of steps that the host may be ahead of CUDA. The device always has work then, and a run
# that is stopped does not wait for many steps.
STEPS_AHEAD = 2


class _Pending(NamedTuple):
    """A step whose results have not been read from the device."""

    step: int
    lr: float
    values: Tensor
    """(3,) loss, gradient norm, and Optimizer.skipped."""
    copied: torch.cuda.Event | None
    """Recorded after the copy to the host; None if the device is not CUDA."""


class Metrics:
    """Write RUN/metrics.jsonl and show the progress bar.

    Rank 0 writes. The other ranks read their results at the same steps, so that all ranks know at
    the same step that a run diverged.

    A training line has the keys:
        step, lr.
        loss: in nats; null if it is not finite.
        tokens: targets seen up to and with this step.
        grad_norm: null if it is not finite.
        skipped: whether the update was skipped, because the step was bad or float16 overflowed.
        overflow: true if float16 overflowed, else missing.
        tokens_per_second.
        mfu: fraction of the devices' bf16 peak; null if the peak of the device is not known.
        memory: peak bytes in use so far, on rank 0.
        data_wait: fraction of the time that rank 0 waited for batches.
        checkpoint_stall: seconds that steps have waited for checkpoints, since this process began.
    An evaluation writes a line with step and the keys of Evaluation.values(): val_loss,
    val_perplexity, val_bits_per_byte and those of the task. It also has the keys of
    eval/in_training.py. A checkpoint writes a line with step, time (Unix seconds), wall_seconds and
    goodput: fractions of the wall time, see goodput.py. A resumed run adds lost_seconds to this
    line: the time of later steps, which it takes again. A run that went back to a checkpoint writes
    a line with `step` (the next step) and `restored` (the step of the checkpoint).

    Args:
        run: the folder of the run. Lines of metrics.jsonl from `start` on are deleted.
        start: first step of this process.
        steps: number of steps of the run.
        tokens_per_step: targets per step, over all ranks.
        flops_per_token: FLOPs of forward and backward per token, for mfu.
        device: the device of this rank.
        compiles: whether the first step compiles. Its time counts as compilation.
        world: all ranks. Each has its own Metrics.
        log_interval: steps between lines with the loss, if the output is not a terminal. 0: none.
        trackers: receive the lines of training and of evaluations too.
    Attributes:
        evaluated: steps with an evaluation.
        goodput: how the run divides its wall time.
        bad_steps: the bad steps in a row before the last step that was read, oldest first.
        skipped: number of skipped steps of the run.
        restored: the last line of a return to a checkpoint; None without one.
        checkpoint_stall: the value of this key in the next lines. The caller sets it.
    """

    def __init__(
        self, run: Path, *, start: int, steps: int, tokens_per_step: int, flops_per_token: int,
        device: torch.device, compiles: bool = False, world: World = SINGLE_PROCESS,
        log_interval: int = 0, trackers: Sequence[Tracker] = (),
    ):  # fmt: skip
        path = run / "metrics.jsonl"
        kept = world.on_rank0(lambda: _cut_back(path, start, steps))
        self.evaluated = kept.evaluated
        self.goodput = Goodput(kept.seconds)
        self.bad_steps = kept.bad_steps
        self.skipped = kept.skipped
        self.restored = kept.restored
        path = path if world.is_rank0 else os.devnull
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._device = device
        self._compiles = compiles
        self._log_interval = 0 if has_bars() else log_interval
        self._trackers = trackers
        known = ceiling(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak_flops = known.bf16_flops * world.size if known else None

        self._pending: list[_Pending] = []
        self._last_read = time.perf_counter()
        self._seconds_waited = 0.0
        self._cores = CoreTime(torch.get_num_threads() if device.type == "cpu" else 1)
        self.checkpoint_stall = 0.0

        self._first = start
        self._bars = progress_bars(has_count=True)
        note = "compiling" if compiles else ""
        self._task = self._bars.add_task("train", total=steps, completed=start, note=note)

    def __enter__(self) -> "Metrics":
        self._bars.start()
        self.goodput.begin("compilation" if self._compiles else "steps")
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Exclude the time inside from the rates, and count it as a phase of goodput.PHASES."""
        self.flush()
        with self.goodput.during(phase):
            yield
        self._last_read = time.perf_counter()
        self._cores.start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for a batch."""
        began = time.perf_counter()
        with torch.profiler.record_function("data"), self.goodput.during("data_wait"):
            yield
        self._seconds_waited += time.perf_counter() - began

    def progress(self, label: str, total: float | None) -> AbstractContextManager:
        """Show a second bar while the context lasts, as progress.progress does."""
        return task_of(self._bars, label, total)

    def step(self, step: int, loss: Tensor, lr: float, grad_norm: Tensor, skipped: Tensor) -> None:
        """Record an optimizer step. The tensors are on the device and read later."""
        self.goodput.begin("steps")
        # 3 microseconds (AMD EPYC, 26 November 2026). On CUDA the bar is STEPS_AHEAD of the device.
        note = {"note": ""} if step == self._first else {}  # it is compiled now
        self._bars.update(self._task, completed=step + 1, **note)
        values = torch.stack((loss, grad_norm, skipped)).float().to("cpu", non_blocking=True)
        on_cuda = self._device.type == "cuda"
        copied = None
        if on_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
        self._pending.append(_Pending(step, lr, values, copied))
        if on_cuda and len(self._pending) > STEPS_AHEAD:
            self._pending[-1 - STEPS_AHEAD].copied.synchronize()
        # The steps of a read depend on the number of the step only. So a resumed run learns of bad
        # steps where an unbroken run does.
        if (step + 1 - on_cuda) % STEPS_PER_READ == 0 and len(self._pending) > on_cuda:
            self._read(len(self._pending) - on_cuda)

    def flush(self) -> None:
        """Read all recorded steps from the device and write their lines."""
        if self._pending:
            self._read(len(self._pending))

    def _read(self, count: int) -> None:
        """Wait for the first `count` pending steps and write their lines."""
        done = self._pending[:count]
        self._pending = self._pending[count:]
        if done[-1].copied is not None:
            done[-1].copied.synchronize()

        # Rates are means over these steps.
        now = time.perf_counter()
        seconds = now - self._last_read
        self._last_read = now
        if warning := self._cores.end():
            console.print(warning)
        rate = count * self._tokens_per_step / seconds
        mfu = rate * self._flops_per_token / self._peak_flops if self._peak_flops else None
        rates = {
            "tokens_per_second": rate,
            "mfu": mfu,
            "memory": _memory(self._device),
            "data_wait": self._seconds_waited / seconds,
            "checkpoint_stall": self.checkpoint_stall,
        }
        self._seconds_waited = 0.0

        for step, lr, values, _ in done:
            loss, norm, skipped = values.tolist()
            line = {
                "step": step,
                "tokens": (step + 1) * self._tokens_per_step,
                "loss": loss if math.isfinite(loss) else None,
                "lr": lr,
                "grad_norm": norm if math.isfinite(norm) else None,
                "skipped": bool(skipped),
            }
            if skipped == OVERFLOWED:
                line["overflow"] = True
            self.skipped += _count_skipped(line, self.bad_steps)
            self._write(line | rates)
            if self._log_interval and (step + 1) % self._log_interval == 0:
                console.print(f"step {step + 1}: loss {loss:.4f}, {rate:,.0f} tokens/s")
        note = f"loss {loss:.3f}  {rate:,.0f} tokens/s" + (f"  {mfu:.1%} MFU" if mfu else "")
        if self.skipped:
            note += f"  {self.skipped} skipped"
        self._bars.update(self._task, note=note)

    def went_back(self, step: int, restored: int) -> None:
        """Record that the run continues at `step` with the checkpoint of `restored` steps."""
        self.bad_steps.clear()
        self.restored = {"step": step, "restored": restored}
        self._write(self.restored, is_tracked=False)

    def write_goodput(self, step: int) -> None:
        """Record how the run has divided its wall time up to `step` steps."""
        line = {"step": step, **self.goodput.record(), "skipped_steps": self.skipped}
        self._write(line, is_tracked=False)

    def sync(self) -> None:
        """Flush the lines to the disk. After a power cut a checkpoint has the lines before it."""
        if self._file.name != os.devnull:
            os.fsync(self._file.fileno())

    def evaluation(
        self, step: int, result: Evaluation, more: dict[str, float] | None = None
    ) -> None:
        """Write and show an evaluation after `step` steps. `more`: other values of the line."""
        more = more or {}
        self._write({"step": step, **result.values(), **more})
        self.evaluated.add(step)
        console.print(f"step {step}: {result.describe()}")
        for name, value in more.items():
            console.print(f"  {name} {value:.4f}")

    def _write(self, line: dict, *, is_tracked: bool = True) -> None:
        with names_file(self._file.name):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for tracker in self._trackers if is_tracked else ():
            tracker.write(line)


def _count_skipped(line: dict, bad_steps: list[dict]) -> bool:
    """Return whether a training line is of a skipped step, and bring `bad_steps` up to date.

    A bad step is added. A step that was not skipped empties the list. A step that overflowed in
    float16 does not change it.
    """
    is_skipped = bool(line.get("skipped"))
    if not is_skipped:
        bad_steps.clear()
    elif not line.get("overflow"):
        bad_steps.append(line)
    return is_skipped


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """Return the training lines and the evaluation lines of a run. Damaged lines are left out."""
    lines = read_lines(run)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    return training, evaluations


def check_metrics(run: Path) -> None:
    """Raise InputError unless a run has metrics of a step. Print how many lines cannot be read."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise InputError(f"{run}: expected metrics.jsonl, found none; the run has no step yet")
    if not any("loss" in row for row in _rows(file)):
        raise InputError(
            f"{file}: expected lines with step, loss, lr and grad_norm, found none; the run has no "
            "step yet, or an older version wrote it"
        )
    if found := describe_damage(run):
        print(f"tritium: {file}: {found}", file=sys.stderr)


def describe_damage(run: Path) -> str | None:
    """Return how many lines of metrics.jsonl are damaged; None if there are none."""
    file = run / "metrics.jsonl"
    count = len(file.read_text(encoding="utf-8", errors="replace").splitlines())
    unread = count - len(read_lines(run))
    return f"{unread:,} of {count:,} lines cannot be read and are left out" if unread else None


def read_lines(run: Path) -> list[dict]:
    """Return all lines of a run. Damaged lines are left out."""
    return list(_rows(run / "metrics.jsonl"))


def describe_goodput(run: Path) -> str:
    """Describe how the run divided its wall time, and how many steps it skipped, in one line.

    Returns "not known" if the file has no such line: it was deleted, or a program changed it.
    """
    lines = [row for row in _rows(run / "metrics.jsonl") if "goodput" in row]
    if not lines or "steps" not in lines[-1]["goodput"]:
        return "not known"
    line = lines[-1]
    skipped = line["skipped_steps"]
    return describe(line) + (f"; {plural(skipped, 'step')} skipped" if skipped else "")


def _rows(path: Path) -> Iterator[dict]:
    """Yield the lines of metrics.jsonl that are not damaged."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return (row for row in map(parse_line, text.splitlines()) if row is not None)


@dataclass
class _Kept:
    """Values from the lines before the first step of a resumed run."""

    evaluated: set[int] = field(default_factory=set)
    """Steps with an evaluation."""
    skipped: int = 0
    bad_steps: list[dict] = field(default_factory=list)
    restored: dict | None = None
    seconds: dict[str, float] | None = None
    """Seconds of each phase of goodput.py; None if no process ran before."""


def _cut_back(path: Path, start: int, steps: int) -> _Kept:
    """Delete lines that a resumed run writes again, and lines that are damaged."""
    kept = _Kept()
    if start > 0:
        kept.seconds = {}
    rows = []
    trained = set()
    goodput, lost = None, 0.0
    for row in _rows(path) if path.exists() else ():
        step = row["step"]
        if "loss" in row and step < start:
            trained.add(step)
            kept.skipped += _count_skipped(row, kept.bad_steps)
        # The evaluation after the last step is always repeated: resuming a finished run
        # returns it.
        elif "val_loss" in row and (step < start or step == start < steps):
            kept.evaluated.add(step)
        elif "restored" in row and step <= start:
            kept.restored = row
            kept.bad_steps.clear()
        elif "goodput" in row and step <= start:
            goodput = row
        else:
            if rate := row.get("tokens_per_second"):
                lost += row.get("tokens", 0) / (step + 1) / rate
            continue
        rows.append(row)
    if len(trained) < start:
        console.print(
            f"metrics.jsonl: {start - len(trained)} of the {start} steps before the checkpoint "
            "have no line: they were lost"
        )
    if goodput is not None:
        lost += goodput.get("lost_seconds", 0.0)
        if lost:  # the next resume from this checkpoint does not find the deleted lines
            goodput["lost_seconds"] = lost
        kept.seconds = seconds_before(goodput, lost)
    write_whole(path, ["".join(json.dumps(row) + "\n" for row in rows).encode()])
    return kept


def _memory(device: torch.device) -> int:
    """Most bytes in use so far: of CUDA's allocator, or of the process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
