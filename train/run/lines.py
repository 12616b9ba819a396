"""The lines of RUN/metrics.jsonl. metrics.py writes them."""

from dataclasses import dataclass
from typing import Any

from ...errors import InputError
from ..storage.records import check_types, parse_object


@dataclass
class _Line:
    """The values of a line that a program computes with."""

    step: int
    tokens: int
    tokens_per_second: float
    loss: float | None
    lr: float
    grad_norm: float | None
    skipped: bool
    overflow: bool
    val_loss: float
    val_bits_per_byte: float
    time: float
    wall_seconds: float
    goodput: dict[str, float]
    lost_seconds: float
    skipped_steps: int
    restored: int


# A line has one of these keys, and all keys of its group.
_GROUPS = {
    "loss": ("lr", "grad_norm"),
    "val_loss": (),
    "goodput": ("time", "wall_seconds", "skipped_steps"),
    "restored": (),
}


def parse_line(line: str) -> dict[str, Any] | None:
    """Return a line that metrics.py writes, or None for any other text."""
    try:
        row = parse_object(line)
        check_types(row, _Line)
    except (ValueError, InputError):
        return None
    is_known = any(
        name in row and all(other in row for other in others) for name, others in _GROUPS.items()
    )
    return row if row.get("step", -1) >= 0 and is_known else None
