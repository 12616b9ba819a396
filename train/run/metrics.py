"""What a run leaves to read: a line of metrics a step, a plot, samples; and what the terminal shows meanwhile."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ...errors import InputError
from ...kernels.core.device import ceiling
from ..config import DIVERGED
from ..distributed.world import SINGLE_PROCESS, World
from ..evaluate import Evaluation
from ..files import write_whole
from .trackers import Tracker

# Steps that are read back from the device at a time. On CUDA the newest one is left out, so that while the host waits for those
# before it the device has work.
STEPS_PER_READ = 10
console = Console(stderr=True, highlight=False)


class Metrics:
    """RUN/metrics.jsonl and the progress bar, of the first rank; the others keep step, so that a diverged run ends on all.

    A training line holds step, tokens (seen so far), loss (nats), lr, grad_norm (null where float16 overflowed and the step was
    left out), tokens_per_second, mfu (share of the devices' bf16 peak; null where the table does not know it), memory (bytes
    at most so far) and data_wait (share of the time that the host waited for batches), both of the first rank; an evaluation
    adds val_loss, val_perplexity and val_bits_per_byte in a line of its own.

    Args:
        run: the run's folder; its metrics.jsonl is cut back to the lines before `start`.
        start, steps: first step of this process, and how many the whole run has.
        tokens_per_step: targets a step.
        flops_per_token: for mfu.
        skips_overflow: whether a step with gradients that are not finite was left out; else the run has diverged.
        world: ranks that train together, each of which has one.
        trackers: get each line too.
    Attributes: evaluated: steps after which there has been an evaluation.
    """

    def __init__(
        self, run: Path, *, start: int, steps: int, tokens_per_step: int, flops_per_token: int, device: torch.device,
        skips_overflow: bool, world: World = SINGLE_PROCESS, trackers: Sequence[Tracker] = (),
    ):  # fmt: skip
        path = run / "metrics.jsonl"
        self.evaluated = world.on_rank0(lambda: _cut_back(path, start, steps))
        path = path if world.is_rank0 else os.devnull
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run lasts
        self._tokens_per_step, self._flops_per_token, self._device = (
            tokens_per_step,
            flops_per_token,
            device,
        )
        self._skips_overflow, self._trackers = skips_overflow, trackers
        known = ceiling(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = known and known.bf16_flops * world.size
        self._waiting: list[tuple[int, float, Tensor, torch.cuda.Event | None]] = []
        self._clock, self._waited = time.perf_counter(), 0.0
        self.seconds = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        # In a file the bar would be one line at the end; evaluations are printed either way.
        silent = console.quiet or not console.is_terminal
        self._bar = Progress(
            *columns, TimeRemainingColumn(compact=True), console=console, disable=silent
        )
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
    def paused(self):
        """Leave what happens inside (evaluation, samples, checkpoints) out of the rates."""
        self.flush()
        yield
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self):
        """Count what happens inside as waiting for a batch."""
        began = time.perf_counter()
        with torch.profiler.record_function("data"):
            yield
        self._waited += time.perf_counter() - began

    def step(self, step: int, loss: Tensor, lr: float, grad_norm: Tensor) -> None:
        """Note one optimizer step, whose `loss` and `grad_norm` are on the device; nothing waits for them here."""
        values = torch.stack((loss, grad_norm)).float().to("cpu", non_blocking=True)
        on_cuda, copied = self._device.type == "cuda", None
        if on_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
        self._waiting.append((step, lr, values, copied))
        if len(self._waiting) == STEPS_PER_READ + on_cuda:
            self._read(STEPS_PER_READ)

    def flush(self) -> None:
        """Read back all steps noted so far and write their lines."""
        if self._waiting:
            self._read(len(self._waiting))

    def _read(self, count: int) -> None:
        """Write the lines of the first `count` steps noted, once they are done; rates are means over them."""
        read, self._waiting = self._waiting[:count], self._waiting[count:]
        if (copied := read[-1][3]) is not None:
            copied.synchronize()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.seconds += seconds
        rate = count * self._tokens_per_step / seconds
        waited, self._waited = self._waited / seconds, 0.0
        mfu = rate * self._flops_per_token / self._peak if self._peak else None
        memory = _memory(self._device)
        for step, lr, values, _ in read:
            loss, norm = values.tolist()
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._skips_overflow):
                raise InputError(
                    f"{DIVERGED} (loss {loss}, gradients of norm {norm} at step {step}, learning rate {lr:.3g})"
                )
            tokens = (step + 1) * self._tokens_per_step
            row = {
                "step": step,
                "tokens": tokens,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm if math.isfinite(norm) else None,
            }
            self._write(
                row | {"tokens_per_second": rate, "mfu": mfu, "memory": memory, "data_wait": waited}
            )
        note = f"loss {loss:.3f}  {rate:,.0f} tokens/s" + (f"  {mfu:.1%} MFU" if mfu else "")
        self._bar.update(self._task, completed=step + 1, note=note)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Write and show an evaluation after `step` steps."""
        loss, perplexity, bits = result.loss, result.perplexity, result.bits_per_byte
        self._write(
            {
                "step": step,
                "val_loss": loss,
                "val_perplexity": perplexity,
                "val_bits_per_byte": bits,
            }
        )
        self.evaluated.add(step)
        console.print(
            f"step {step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}, {bits:.3f} bits a byte"
        )

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(row)


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """Training lines and evaluation lines of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


def plot_loss(run: Path) -> Path:
    """Draw RUN/loss.png from metrics.jsonl: training loss of each step, its running mean, and validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, evaluations = read_metrics(run)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = [row["step"] + 1 for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color="#b0c4de", linewidth=0.8, label="training, each step")
    axes.plot(
        steps, _running_mean(losses), color="#1f4e79", linewidth=1.6, label="training, running mean"
    )
    axes.plot(
        [row["step"] for row in evaluations],
        [row["val_loss"] for row in evaluations],
        "o-", color="#c0392b", markersize=4, label="validation",
    )  # fmt: skip
    if evaluations:
        last = evaluations[-1]
        axes.annotate(
            f"{last['val_loss']:.3f}",
            (last["step"], last["val_loss"]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
        )
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", title=run.name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = run / "loss.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _running_mean(values: list[float], share: float = 0.05) -> list[float]:
    """Exponential mean over about `share` of the values, corrected for its start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def _cut_back(path: Path, start: int, steps: int) -> set[int]:
    """Drop the lines of what a resumed run does again and any that is none of ours; return the steps of evaluations kept."""
    kept, evaluated = [], set()
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    ):
        try:
            row = json.loads(line)
            is_evaluation, step = "val_loss" in row, int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        # The evaluation at the end is done again: it is what a finished run that is resumed answers with.
        if step < start or (is_evaluation and step == start < steps):
            kept.append(line + "\n")
            if is_evaluation:
                evaluated.add(step)
    write_whole(path, ["".join(kept).encode()])
    return evaluated


def _memory(device: torch.device) -> int:
    """Most bytes in use so far: the allocator's on CUDA, the process's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # ru_maxrss is in bytes on macOS, in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
