"""The lines of RUN/metrics.jsonl. metrics.py writes them."""

from dataclasses import dataclass
from typing import Any

from ...errors import InputError
from ..records import check_types, parse_object


@dataclass
class _Line:
    """The values of a line that a program computes with."""

    step: int
    loss: float
    val_loss: float


def parse_line(line: str) -> dict[str, Any] | None:
    """Return a line of training or of an evaluation, or None for any other text."""
    try:
        row = parse_object(line)
        check_types(row, _Line)
    except (ValueError, InputError):
        return None
    return row if "step" in row and ("loss" in row or "val_loss" in row) else None
