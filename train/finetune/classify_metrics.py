"""Accuracy, precision, recall and F1 of a classifier, from its confusion matrix.

    counts[i, j]    texts with label i that the model gave label j
    precision_j     counts[j, j] / sum_i counts[i, j]
    recall_i        counts[i, i] / sum_j counts[i, j]
    F1              2 precision recall / (precision + recall); macro F1 is the mean over labels

A fraction without any text in its denominator is 0, as in scikit-learn.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..run.plots import shown
from ..storage.files import write_whole

# Labels in the text and in the picture are cut to this length.
_LABEL_CHARACTERS = 24
# Without a limit a picture of 1,000 labels would take minutes.
_MOST_DRAWN = 50


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix.

    Attributes:
        labels: the C names.
        counts: (C, C) int64; rows are true labels, columns are predictions.
    """

    labels: Sequence[str]
    counts: np.ndarray

    @classmethod
    def of(cls, labels: Sequence[str], truth: np.ndarray, prediction: np.ndarray) -> "Confusion":
        """Count pairs. truth, prediction: (N,) int64 in [0, C)."""
        C = len(labels)
        counts = np.bincount(truth * C + prediction, minlength=C * C)
        return cls(labels, counts.reshape(C, C))

    @property
    def accuracy(self) -> float:
        """Fraction of the texts with the right label."""
        return float(_ratio(np.trace(self.counts), self.counts.sum()))

    @property
    def precision(self) -> np.ndarray:
        """(C,)"""
        return _ratio(self.counts.diagonal(), self.counts.sum(0))

    @property
    def recall(self) -> np.ndarray:
        """(C,)"""
        return _ratio(self.counts.diagonal(), self.counts.sum(1))

    @property
    def f1(self) -> np.ndarray:
        """(C,)"""
        return _ratio(2 * self.counts.diagonal(), self.counts.sum(0) + self.counts.sum(1))

    def numbers(self) -> dict[str, float]:
        """Return accuracy, macro F1, and precision, recall and F1 of each label, by name."""
        found = {"accuracy": self.accuracy, "f1": float(self.f1.mean())}
        for name in ("precision", "recall", "f1"):
            values = getattr(self, name).tolist()
            found |= {f"{name}/{label}": x for label, x in zip(self.labels, values, strict=True)}
        return found

    def table(self) -> str:
        """Return the matrix and the numbers of each label as text. Rows are true labels."""
        names = [_short(label) for label in self.labels]
        width = max(9, *map(len, names))
        header = ["true", *names, "precision", "recall", "F1"]
        rows = [
            [name, *map(str, counts), f"{p:.4f}", f"{r:.4f}", f"{f:.4f}"]
            for name, counts, p, r, f in zip(
                names, self.counts.tolist(), self.precision, self.recall, self.f1, strict=True
            )
        ]
        lines = ["".join(f"{cell:>{width + 2}}" for cell in row) for row in (header, *rows)]
        return "\n".join(lines)

    def draw(self, file: Path, title: str) -> None:
        """Draw the matrix as a PNG file: the whole file or nothing."""
        from matplotlib.figure import Figure

        C = min(len(self.labels), _MOST_DRAWN)
        names = [shown(_short(label)) for label in self.labels[:C]]
        counts = self.counts[:C, :C]
        size = 3 + 0.5 * C
        figure = Figure(figsize=(size, size), layout="constrained")
        axes = figure.subplots()
        rates = _ratio(counts, counts.sum(1, keepdims=True))
        axes.imshow(rates, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(C, C):
            color = "white" if rates[i, j] > 0.6 else "black"
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=color)
        axes.set_xticks(range(C), names, rotation=45 if C > 4 else 0)
        axes.set_yticks(range(C), names)
        axes.set(xlabel="prediction", ylabel="label", title=shown(title))
        content = io.BytesIO()
        figure.savefig(content, dpi=150, format="png")
        write_whole(file, [content.getbuffer()])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return numerator / np.maximum(denominator, 1)


def _short(label: str) -> str:
    label = " ".join(label.split())
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[: _LABEL_CHARACTERS - 3]}..."
