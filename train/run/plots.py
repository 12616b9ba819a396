"""The plot of a run: RUN/loss.png."""

import io
from pathlib import Path

from ..files import write_whole
from .metrics import read_metrics


def plot_loss(run: Path) -> Path:
    """Draw the training loss, its running mean and the validation loss. Return RUN/loss.png."""
    from matplotlib.figure import Figure

    training, evaluations = read_metrics(run)
    training = [line for line in training if line["loss"] is not None]
    # Training waits for the plot. pyplot and a computed layout would take longer: 0.27 s, not
    # 0.18 s (AMD EPYC, 2026-11-26).
    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.12, top=0.92)
    axes = figure.subplots()

    # training loss
    steps = [line["step"] + 1 for line in training]
    losses = [line["loss"] for line in training]
    mean = _running_mean(losses)
    axes.plot(steps, losses, color="#b0c4de", linewidth=0.8, label="training, each step")
    axes.plot(steps, mean, color="#1f4e79", linewidth=1.6, label="training, running mean")

    # validation loss
    steps = [line["step"] for line in evaluations]
    losses = [line["val_loss"] for line in evaluations]
    axes.plot(steps, losses, "o-", color="#c0392b", markersize=4, label="validation")
    if evaluations:
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
        )

    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=run.name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = run / "loss.png"
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_whole(path, [content.getbuffer()])
    return path


def _running_mean(values: list[float], fraction: float = 0.05) -> list[float]:
    """Exponential mean over about `fraction` of the values, without bias at the start."""
    decay = 1 - 1 / max(1.0, fraction * len(values))
    means = []
    total = 0.0
    weight = 0.0
    for value in values:
        total = decay * total + value
        weight = decay * weight + 1
        means.append(total / weight)
    return means
