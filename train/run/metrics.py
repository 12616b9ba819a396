"""The metrics of a run: RUN/metrics.jsonl, the progress bar, and the lines in the terminal."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ...errors import InputError, names_file
from ...kernels.core.device import ceiling
from ..config import DIVERGED
from ..distributed.world import SINGLE_PROCESS, World
from ..evaluate import Evaluation
from ..files import write_whole
from .lines import parse_line
from .trackers import Tracker

# Number of steps whose results are read from the device at once. On CUDA the newest step is left
# for the next read, so that the device has work while the host waits for the steps before it.
STEPS_PER_READ = 10
console = Console(stderr=True, highlight=False)


class _Pending(NamedTuple):
    """A step whose results have not been read from the device."""

    step: int
    lr: float
    values: Tensor
    """(2,) loss and gradient norm."""
    copied: torch.cuda.Event | None
    """Recorded after the copy to the host; None if the device is not CUDA."""


class Metrics:
    """Write RUN/metrics.jsonl and show the progress bar.

    Rank 0 writes. The other ranks read their results at the same steps, so that a diverged run
    stops on all ranks.

    A training line has the keys:
        step, loss (nats), lr.
        tokens: targets seen up to and with this step.
        grad_norm: null if float16 overflowed and the optimizer skipped the step.
        tokens_per_second.
        mfu: fraction of the devices' bf16 peak; null if the peak of the device is not known.
        memory: peak bytes in use so far, on rank 0.
        data_wait: fraction of the time that rank 0 waited for batches.
        checkpoint_stall: seconds that steps have waited for checkpoints, since this process began.
    An evaluation writes a line with step, val_loss, val_perplexity and val_bits_per_byte.

    Args:
        run: the folder of the run. Lines of metrics.jsonl from `start` on are deleted.
        start: first step of this process.
        steps: number of steps of the run.
        tokens_per_step: targets per step, over all ranks.
        flops_per_token: FLOPs of forward and backward per token, for mfu.
        device: the device of this rank.
        skips_overflow: whether the optimizer skips steps with gradients that are not finite. If
            not, such a step means that the run has diverged.
        world: all ranks. Each has its own Metrics.
        trackers: receive each line too.
    Attributes:
        evaluated: steps with an evaluation.
        seconds: time spent in steps.
        checkpoint_stall: the value of this key in the next lines. The caller sets it.
    """

    def __init__(
        self, run: Path, *, start: int, steps: int, tokens_per_step: int, flops_per_token: int,
        device: torch.device, skips_overflow: bool, world: World = SINGLE_PROCESS,
        trackers: Sequence[Tracker] = (),
    ):  # fmt: skip
        path = run / "metrics.jsonl"
        self.evaluated = world.on_rank0(lambda: _cut_back(path, start, steps))
        path = path if world.is_rank0 else os.devnull
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._device = device
        self._skips_overflow = skips_overflow
        self._trackers = trackers
        known = ceiling(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak_flops = known.bf16_flops * world.size if known else None

        self._pending: list[_Pending] = []
        self._last_read = time.perf_counter()
        self._seconds_waited = 0.0
        self.seconds = 0.0
        self.checkpoint_stall = 0.0

        self._bar = _progress_bar()
        self._task = self._bar.add_task("train", total=steps, completed=start, note="")

    def __enter__(self) -> "Metrics":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside (evaluation, samples, checkpoints) from the rates."""
        self.flush()
        yield
        self._last_read = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for a batch."""
        began = time.perf_counter()
        with torch.profiler.record_function("data"):
            yield
        self._seconds_waited += time.perf_counter() - began

    def step(self, step: int, loss: Tensor, lr: float, grad_norm: Tensor) -> None:
        """Record an optimizer step. `loss` and `grad_norm` are on the device and read later."""
        values = torch.stack((loss, grad_norm)).float().to("cpu", non_blocking=True)
        on_cuda = self._device.type == "cuda"
        copied = None
        if on_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
        self._pending.append(_Pending(step, lr, values, copied))
        if len(self._pending) == STEPS_PER_READ + on_cuda:
            self._read(STEPS_PER_READ)

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
        self.seconds += seconds
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
            loss, norm = values.tolist()
            self._check_finite(step, lr, loss, norm)
            line = {
                "step": step,
                "tokens": (step + 1) * self._tokens_per_step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm if math.isfinite(norm) else None,
            }
            self._write(line | rates)
        note = f"loss {loss:.3f}  {rate:,.0f} tokens/s" + (f"  {mfu:.1%} MFU" if mfu else "")
        self._bar.update(self._task, completed=step + 1, note=note)

    def _check_finite(self, step: int, lr: float, loss: float, norm: float) -> None:
        if math.isfinite(loss) and (math.isfinite(norm) or self._skips_overflow):
            return
        raise InputError(
            f"{DIVERGED} (loss {loss}, gradient norm {norm} at step {step}, learning rate {lr:.3g})"
        )

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Write and show an evaluation after `step` steps."""
        line = {
            "step": step,
            "val_loss": result.loss,
            "val_perplexity": result.perplexity,
            "val_bits_per_byte": result.bits_per_byte,
        }
        self._write(line)
        self.evaluated.add(step)
        console.print(
            f"step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.3f} bits per byte"
        )

    def _write(self, line: dict) -> None:
        with names_file(self._file.name):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.write(line)


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """Return the training lines and the evaluation lines of a run. Damaged lines are left out."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    lines = [row for row in map(parse_line, text.splitlines()) if row is not None]
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    return training, evaluations


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
    )
    # In a file, the bar would only be a line at the end. Evaluations are always printed.
    return Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)


def _cut_back(path: Path, start: int, steps: int) -> set[int]:
    """Delete lines that a resumed run writes again, and lines that are damaged.

    Returns: the steps of the evaluations that are kept.
    """
    kept = []
    evaluated = set()
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        row = parse_line(line)
        if row is None:
            continue
        is_evaluation = "val_loss" in row
        step = row["step"]
        # The evaluation after the last step is always repeated: resuming a finished run
        # returns it.
        if step < start or (is_evaluation and step == start < steps):
            kept.append(line + "\n")
            if is_evaluation:
                evaluated.add(step)
    write_whole(path, ["".join(kept).encode()])
    return evaluated


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
