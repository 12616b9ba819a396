"""Several runs in one picture or one table: `tritium plot` and `tritium runs`."""

import io
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...model.cost import flops_per_token, parameters
from ..choices import AXES
from ..storage.files import write_whole
from ..storage.lock import is_locked
from .checkpoint import checkpoints
from .folder import read_run
from .metrics import check_metrics, describe_damage, read_metrics
from .plots import running_mean, shown


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The metrics of a run, and the x axes that they can be drawn against."""

    name: str
    training: list[dict]
    evaluations: list[dict]
    tokens_per_step: float
    flops_per_token: int

    @classmethod
    def read(cls, run: Path) -> "Curves":
        """Read a run. Raises: InputError if it is no run, or has no steps yet."""
        record = read_run(run)
        check_metrics(run)
        training, evaluations = read_metrics(run)
        last = training[-1]
        tokens_per_step = last.get("tokens", 0) / (last["step"] + 1)
        # The rows of fine-tuning are shorter than the context.
        row_tokens = round(tokens_per_step / record.train.batch_size)
        row_tokens = row_tokens or record.model.context_tokens
        return cls(
            name=run.name,
            training=training,
            evaluations=evaluations,
            tokens_per_step=tokens_per_step,
            flops_per_token=flops_per_token(record.model, row_tokens, record.train.adapter),
        )

    def x_of_steps(self, axis: str) -> dict[int, float]:
        """Return the value of an axis after each number of steps.

        Seconds are the time of the steps alone, without evaluations, checkpoints and stops.
        """
        values = {0: 0.0}
        seconds = 0.0
        for line in self.training:
            done = line["step"] + 1
            rate = line.get("tokens_per_second")
            seconds += self.tokens_per_step / rate if rate else 0.0
            tokens = done * self.tokens_per_step
            values[done] = {
                "steps": done,
                "tokens": tokens,
                "seconds": seconds,
                "flops": tokens * self.flops_per_token,
            }[axis]
        return values


def plot_runs(runs: list[Path], file: Path, axis: str) -> None:
    """Draw loss, learning rate, gradient norm and throughput of runs.

    Args:
        runs: their folders.
        file: the picture to write; its suffix names the format, such as .png, .svg or .pdf.
        axis: a row of AXES.
    Raises: InputError if a folder is no run, or the format is not known.
    """
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

    formats = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in formats:
        raise InputError(f"out: expected a file that ends in .png, .svg or .pdf, got {str(file)!r}")
    curves = [Curves.read(run) for run in runs]
    names = [shown(name) for name in _distinct_names(runs)]
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for number, (name, curve) in enumerate(zip(names, curves, strict=True)):
        _draw(panels, curve, name, f"C{number % 10}", axis)
    titles = ("loss, nats per token", "learning rate", "gradient norm", "tokens per second")
    for panel, title in zip(panels.flat, titles, strict=True):
        panel.set(title=title, xlabel=AXES[axis])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[1, 0].set(yscale="log")
    panels[1, 1].set(ylim=(0, None))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format=file.suffix.removeprefix("."))
    write_whole(file, [content.getbuffer()])


def _draw(panels, curve: Curves, name: str, color: str, axis: str) -> None:
    x_of_steps = curve.x_of_steps(axis)
    x = [x_of_steps[line["step"] + 1] for line in curve.training]

    # The loss of each step hides the other runs: draw its running mean, and the evaluations.
    known = [
        (x_, line["loss"])
        for x_, line in zip(x, curve.training, strict=True)
        if line["loss"] is not None
    ]
    if known:
        means = running_mean([loss for _, loss in known], fraction=0.02)
        panels[0, 0].plot([x_ for x_, _ in known], means, color=color, linewidth=1.2, label=name)
    done = [line for line in curve.evaluations if line["step"] in x_of_steps]
    panels[0, 0].plot(
        [x_of_steps[line["step"]] for line in done],
        [line["val_loss"] for line in done],
        "o",
        color=color,
        markersize=4,
        label=f"{name}, validation",
    )

    for panel, key in (
        (panels[0, 1], "lr"),
        (panels[1, 0], "grad_norm"),
        (panels[1, 1], "tokens_per_second"),
    ):
        values = [float("nan") if line.get(key) is None else line[key] for line in curve.training]
        panel.plot(x, values, color=color, linewidth=1)


def _distinct_names(runs: list[Path]) -> list[str]:
    """Return the names of the folders, or their paths if two have one name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def describe_run(run: Path) -> dict[str, str]:
    """Return the columns of a run in the table of `tritium runs`.

    Raises: InputError if the folder is no run.
    """
    record = read_run(run)
    has_metrics = (run / "metrics.jsonl").is_file()
    training, evaluations = read_metrics(run) if has_metrics else ([], [])
    damage = describe_damage(run) if has_metrics else None
    done = max(checkpoints(run), default=0)
    status = _status(run, done, record.train.steps)
    rates = sorted(line["tokens_per_second"] for line in training if "tokens_per_second" in line)
    last = evaluations[-1] if evaluations else {}
    bits = last.get("val_bits_per_byte")
    return {
        "run": str(run),
        "task": record.train.task,
        "parameters": f"{parameters(record.model):,}",
        "steps": f"{done:,} of {record.train.steps:,}",
        "tokens": f"{training[-1].get('tokens', 0):,}" if training else "0",
        "loss": f"{last['val_loss']:.4f}" if last else "-",
        "bits per byte": f"{bits:.3f}" if bits is not None else "-",
        "tokens/s": f"{rates[len(rates) // 2]:,.0f}" if rates else "-",
        "status": f"{status}; metrics.jsonl: {damage}" if damage else status,
    }


def _status(run: Path, done: int, steps: int) -> str:
    if is_locked(run):
        return "training"
    if done >= steps:
        return "finished"
    return "stopped" if done or checkpoints(run) else "not started"
