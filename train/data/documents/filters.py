"""Filters of documents: one row of FILTERS each.

A filter computes one value per document and compares it with a threshold. `tritium data build
--filter length=500 repetition` uses the given threshold, or the usual one. dataset.json records the
thresholds, and what each filter dropped.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import InputError, unknown_name
from .text_batch import TextBatch

# Gopher and its successors count repeated runs of five to ten words (arXiv:2112.11446).
_RUN_WORDS = 5
_LANGUAGE_CHARACTERS = 1000


@dataclass(frozen=True)
class Filter:
    """One kind of filter.

    Attributes:
        help: what the value is, for --help.
        values: returns one value per document.
        drops: drops(values, threshold) is true for documents to drop.
        usual: the threshold if none is given.
        highest: the largest threshold with a meaning. None: the threshold is a word.
    """

    help: str
    values: Callable[[TextBatch], np.ndarray]
    drops: Callable[[Any, Any], Any]
    usual: float | str
    highest: float | None


def _languages(batch: TextBatch) -> np.ndarray:
    try:
        import py3langid
    except ImportError:
        raise InputError(
            "filter language: expected the package py3langid, found none; "
            "pip install 'tritium[data]'"
        ) from None
    starts = [text[:_LANGUAGE_CHARACTERS] for text in batch.texts]
    return np.array([py3langid.classify(text)[0] for text in starts], dtype=object)


FILTERS: dict[str, Filter] = {
    "length": Filter(
        help="minimum number of characters",
        values=lambda batch: batch.characters,
        drops=operator.lt,
        usual=200,
        highest=1e12,
    ),
    "repetition": Filter(
        help=f"maximum fraction of {_RUN_WORDS}-word sequences that repeat earlier ones",
        values=lambda batch: batch.repeated_shares(_RUN_WORDS),
        drops=operator.gt,
        usual=0.3,
        highest=1,
    ),
    "symbols": Filter(
        help="maximum fraction of characters that are ASCII symbols",
        values=TextBatch.symbol_shares,
        drops=operator.gt,
        usual=0.3,
        highest=1,
    ),
    # It labels source code as many different languages, so it is never on by default.
    "language": Filter(
        help="code of the language to keep; unreliable for source code",
        values=_languages,
        drops=operator.ne,
        usual="en",
        highest=None,
    ),
}


def parse_filters(words: Sequence[str]) -> dict[str, float | str]:
    """Convert words such as `length=500` or `length` to thresholds by name.

    Raises: InputError for an unknown filter or a threshold out of range.
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in FILTERS:
            raise InputError(unknown_name("filter", name, FILTERS))
        row = FILTERS[name]
        found[name] = _threshold(name, row, value) if equals else row.usual
    return found


def _threshold(name: str, row: Filter, value: str) -> float | str:
    if row.highest is None:
        if not value.isalpha():
            raise InputError(f"filter {name}: expected a word such as {row.usual}, got {value!r}")
        return value
    try:
        number = float(value)
    except ValueError:
        number = -1
    if not 0 <= number <= row.highest:
        raise InputError(
            f"filter {name}: expected a number from 0 to {row.highest:g}, got {value!r}; "
            f"{row.usual} is usual"
        )
    return number


def apply_filters(
    batch: TextBatch, thresholds: Mapping[str, float | str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Apply each filter to each document.

    Returns: by name, the values, and whether the filter drops the document; both (documents,).
    """
    results = {}
    for name, threshold in thresholds.items():
        values = FILTERS[name].values(batch)
        results[name] = values, np.asarray(FILTERS[name].drops(values, threshold), bool)
    return results


def describe_filters() -> str:
    """Return one line per filter, for --help."""
    return "\n\n".join(f"{name}={row.usual}: {row.help}" for name, row in FILTERS.items())
