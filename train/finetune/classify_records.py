"""Labelled texts from a file, without copies, in a training, a validation and a test part.

    FILE.tsv, FILE.csv    a column with the text and one with the label. Columns have the names of
                          the first line, or numbers from 1 if the file has no names
    FILE.jsonl            one object per line, with a key for the text and one for the label

A text that occurs again is left out before the split. Otherwise the same text could be in the
training part and in the test part.
"""

import collections
import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..data.tokenizers.tokenizer import without_surrogates
from ..eval.jsonl import read_jsonl
from ..storage.records import csv_rows, shorten


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A text, its label, and the file and line it is from."""

    text: str
    label: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The texts of a run, and the labels of the training part, sorted."""

    train: list[LabelledText]
    val: list[LabelledText]
    test: list[LabelledText]
    labels: tuple[str, ...]


# --- read


def read_labelled_texts(path: Path, text_column: str, label_column: str) -> list[LabelledText]:
    """Read a file.

    Args: text_column, label_column: names of columns or keys, or numbers of columns from 1.
    Returns: the texts. A lone surrogate becomes U+FFFD, as when a text is encoded.
    Raises: InputError, which names the line, if a line cannot be parsed or has no text or label;
        also for another type of file, an empty file and a column that does not exist.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{path}: expected a file {', '.join(_READERS)}, got {path.name!r}")
    texts = [
        LabelledText(
            text=without_surrogates(text),
            label=_check_label(label, label_column, place),
            place=place,
        )
        for place, text, label in _READERS[suffix](path, text_column, label_column)
    ]
    if not texts:
        raise InputError(f"{path}: expected a text and a label per line, got an empty file")
    return texts


def _check_label(label: object, field: str, place: str) -> str:
    is_number = isinstance(label, int | float) and not isinstance(label, bool)
    if not (is_number or isinstance(label, str)) or not str(label).strip():
        raise InputError(f"{place}: {field}: expected a label, got {shorten(label)}")
    return without_surrogates(str(label)).strip()


def _read_objects(
    path: Path, text_column: str, label_column: str
) -> Iterator[tuple[str, str, object]]:
    for place, record in read_jsonl(path):
        for field in (text_column, label_column):
            if field not in record:
                raise InputError(
                    f"{place}: expected a key {field!r}, got {', '.join(map(repr, record))[:100]}; "
                    "name the keys with `text_column` and `label_column`"
                )
        text = record[text_column]
        if not isinstance(text, str):
            raise InputError(f"{place}: {text_column}: expected text, got {shorten(text)}")
        yield place, text, record[label_column]


def _read_columns(
    path: Path, text_column: str, label_column: str
) -> Iterator[tuple[str, str, str]]:
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            rows = csv_rows(lines, path)
            columns = None
            width = 0
            for row in rows:
                number = rows.line_num
                if not row:
                    continue
                place = f"{path}:{number}"
                if columns is None:
                    width = len(row)
                    columns = [_column(place, row, each) for each in (text_column, label_column)]
                    if not (text_column.isdecimal() and label_column.isdecimal()):
                        continue  # these are the names
                if len(row) != width:
                    raise InputError(
                        f"{place}: expected {width} columns, as in the first line, got {len(row)}; "
                        "correct the line"
                    )
                text, label = (row[column] for column in columns)
                yield place, text, label
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: expected {path.suffix[1:]} in UTF-8, got damage after line {number} "
            f"({error}); correct the file"
        ) from None


def _column(place: str, first_row: Sequence[str], field: str) -> int:
    """Return the index of the column with a name or a number from 1."""
    if field.isdecimal() and 1 <= int(field) <= len(first_row):
        return int(field) - 1
    if field not in first_row:
        raise InputError(
            f"{place}: expected a column {field!r}, got {', '.join(first_row)[:100]}; name the "
            "columns with `text_column` and `label_column`, by numbers if the file has no names"
        )
    return first_row.index(field)


# Suffix of a file -> function that yields the place, the text and the label of each line.
_READERS: dict[str, Callable[[Path, str, str], Iterator[tuple[str, str, object]]]] = {
    ".tsv": _read_columns,
    ".csv": _read_columns,
    ".jsonl": _read_objects,
}


# --- choose and split


def without_copies(texts: Sequence[LabelledText]) -> tuple[list[LabelledText], int]:
    """Keep the first of equal texts. Also return how many of its copies have another label."""
    first: dict[str, LabelledText] = {}
    for each in texts:
        first.setdefault(each.text, each)
    num_contradictions = sum(each.label != first[each.text].label for each in texts)
    return list(first.values()), num_contradictions


def balanced(texts: Sequence[LabelledText], seed: int) -> list[LabelledText]:
    """Keep equally many texts of each label, as many as the rarest label has, drawn by `seed`."""
    places = collections.defaultdict(list)
    for place, each in enumerate(texts):
        places[each.label].append(place)
    fewest = min(map(len, places.values()))
    generator = np.random.default_rng((seed, 1))
    kept = [generator.choice(places[label], fewest, replace=False) for label in sorted(places)]
    return [texts[place] for place in np.sort(np.concatenate(kept)).tolist()]


def split_texts(
    texts: Sequence[LabelledText], *, val_fraction: float, test_fraction: float, seed: int
) -> Parts:
    """Split texts in an order that depends on `seed`.

    Args: val_fraction, test_fraction: sizes of two parts, which are rounded down. The training part
        has the other texts.
    Raises: InputError if a part is empty, if the training part has one label only, or if another
        part has a label that the training part does not have.
    """
    order = np.random.default_rng((seed, 0)).permutation(len(texts)).tolist()
    # The small number is more than the rounding errors of the multiplication.
    num_test = int(len(texts) * test_fraction + 1e-9)
    num_val = int(len(texts) * val_fraction + 1e-9)
    split = order[num_test + num_val :], order[num_test:][:num_val], order[:num_test]
    train, val, test = ([texts[place] for place in sorted(part)] for part in split)
    if not (train and val and test):
        raise InputError(
            f"data: expected texts for a training, a validation and a test part, got {len(train)}, "
            f"{len(val)} and {len(test)}; give more texts, or larger fractions"
        )
    labels = tuple(sorted({each.label for each in train}))
    if len(labels) < 2:
        raise InputError(
            f"data: expected two labels or more in the training part, got only {labels[0]!r}; "
            "give texts of other labels"
        )
    for each in (*val, *test):
        if each.label not in labels:
            raise InputError(
                f"{each.place}: expected a label of the training part, {', '.join(labels)[:100]}, "
                f"got {each.label!r}; give more texts of this label, or none"
            )
    return Parts(train=train, val=val, test=test, labels=labels)


def class_weights(texts: Sequence[LabelledText], labels: Sequence[str]) -> list[float]:
    """Return a weight per label, inversely proportional to its frequency.

    The mean over the texts is 1.
    """
    counts = collections.Counter(each.label for each in texts)
    return [len(texts) / (len(labels) * counts[label]) for label in labels]
