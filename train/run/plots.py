"""The plot of a run: RUN/loss.png."""

import io
from pathlib import Path

from ..storage.files import write_whole
from .metrics import read_metrics

# Keys of an evaluation that the first panel draws or that follow from the loss.
_KEYS = ("step", "val_loss", "val_perplexity", "val_bits_per_byte")


def plot_loss(run: Path) -> Path:
    """Draw the training loss, its running mean and the validation loss. Return RUN/loss.png.

    A run with eval_text or eval_choice, or with a task that has other measures than the loss, gets
    a second panel: these measures against tokens, with accuracies and F1 on the right axis.
    """
    from matplotlib.figure import Figure

    training, evaluations = read_metrics(run)
    training = [line for line in training if line["loss"] is not None]
    # Training waits for the plot. pyplot and a computed layout would take longer: 0.27 s, not
    # 0.18 s (AMD EPYC, 2026-11-26).
    has_more = any(name not in _KEYS for line in evaluations for name in line)
    if has_more:
        figure = Figure(figsize=(8, 9))
        figure.subplots_adjust(left=0.08, right=0.92, bottom=0.06, top=0.96, hspace=0.2)
        axes, below = figure.subplots(2)
        _draw_more(below, evaluations, _tokens_per_step(training))
    else:
        figure = Figure(figsize=(8, 4.5))
        figure.subplots_adjust(left=0.08, right=0.98, bottom=0.12, top=0.92)
        axes = figure.subplots()

    # training loss
    steps = [line["step"] + 1 for line in training]
    losses = [line["loss"] for line in training]
    mean = running_mean(losses)
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
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
        )

    has_tokens = not evaluations or "val_perplexity" in evaluations[-1]
    ylabel = "cross-entropy (nats per token)" if has_tokens else "loss (nats)"
    axes.set(xlabel="step", ylabel=ylabel, title=shown(run.name))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = run / "loss.png"
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_whole(path, [content.getbuffer()])
    return path


def _draw_more(axes, evaluations: list[dict], tokens_per_step: float) -> None:
    """Draw bits per byte of all texts and measures of the task against tokens.

    Accuracies and F1 have a second axis.
    """
    right = axes.twinx()
    names = dict.fromkeys(name for line in evaluations for name in line)
    has_bits = False
    for name in names:
        measure = name.rpartition("/")[2]  # the user chose the parts before it
        is_accuracy = "accuracy" in measure or "f1" in measure
        is_of_task = name.startswith("val_") and name not in _KEYS
        if is_of_task and "/" in name:
            continue  # a measure of one label; there may be many labels
        if not is_accuracy and not is_of_task and not name.endswith("bits_per_byte"):
            continue
        has_bits |= name.endswith("bits_per_byte")
        lines = [line for line in evaluations if name in line]
        label = name.removeprefix("text/").removeprefix("choice/").removesuffix("/bits_per_byte")
        (right if is_accuracy else axes).plot(
            [line["step"] * tokens_per_step for line in lines],
            [line[name] for line in lines],
            "s--" if is_accuracy else "o-",
            label="validation" if name == "val_bits_per_byte" else shown(label),
            markersize=4,
            color=f"C{list(names).index(name)}",
        )
    axes.set(xlabel="tokens", ylabel="bits per byte" if has_bits else "")
    axes.spines[["top"]].set_visible(False)
    axes.grid(alpha=0.3)
    if right.lines:
        right.set(ylabel="accuracy, F1 (dashed)", ylim=(0, 1))
        if not axes.lines:
            axes.set_yticks([])
    else:
        right.set_visible(False)
        axes.spines[["right"]].set_visible(False)
    axes.legend(handles=[*axes.lines, *right.lines], frameon=False)


def _tokens_per_step(training: list[dict]) -> float:
    """Return the targets per step; 1 if no line has them."""
    found = [line["tokens"] / (line["step"] + 1) for line in training if "tokens" in line]
    return found[-1] if found else 1.0


def shown(name: str) -> str:
    """Return the text with which matplotlib shows any name as it is.

    Matplotlib reads text between two dollar signs as math, leaves labels that begin with "_" out of
    legends, and cannot draw lone surrogates, which stand for bytes of a path that are not UTF-8.
    """
    text = name.encode("utf-8", "replace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def running_mean(values: list[float], fraction: float = 0.05) -> list[float]:
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
