"""Numbers from a confusion matrix, its text and its picture."""

import numpy as np
import pytest

from tritium.train.finetune.classify_metrics import Confusion

pytestmark = pytest.mark.plain

# 3 labels; nothing is predicted as c, and no text has label d.
TRUTH = np.array([0, 0, 0, 0, 1, 1, 2])
PREDICTION = np.array([0, 0, 0, 1, 1, 0, 1])
LABELS = ("a", "b", "c", "d")


def test_numbers_match_their_definitions():
    numbers = Confusion.of(LABELS, TRUTH, PREDICTION).numbers()
    assert numbers["accuracy"] == pytest.approx(4 / 7)
    assert numbers["precision/a"] == pytest.approx(3 / 4)
    assert numbers["recall/a"] == pytest.approx(3 / 4)
    assert numbers["precision/b"] == pytest.approx(1 / 3)
    assert numbers["recall/b"] == pytest.approx(1 / 2)
    assert numbers["f1/b"] == pytest.approx(2 / 5)
    assert numbers["f1/c"] == numbers["precision/c"] == numbers["recall/d"] == 0
    assert numbers["f1"] == pytest.approx((3 / 4 + 2 / 5) / 4)


def test_the_table_has_a_row_per_label():
    lines = Confusion.of(LABELS, TRUTH, PREDICTION).table().splitlines()
    assert lines[0].split() == ["true", *LABELS, "precision", "recall", "F1"]
    assert lines[1].split() == ["a", "3", "1", "0", "0", "0.7500", "0.7500", "0.7500"]
    assert len({len(line) for line in lines}) == 1


def test_the_picture_is_a_png(tmp_path):
    Confusion.of(("a label\nof two lines", "b" * 99, r"$\frac$", "_d"), TRUTH, PREDICTION).draw(
        tmp_path / "confusion.png", r"$\frac$"
    )
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
