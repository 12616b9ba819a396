"""Records from files: rows of csv, and objects of JSON.

Names and types in objects are checked by the fields of a dataclass.
"""

import csv
import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError, unknown_name

# Most integers end up in a C program. Python's are unlimited.
_LARGEST = 2**63
_LONGEST_FIELD = (1 << 31) - 1  # of csv; Python's default is 131,072


def csv_rows(lines: Iterable[str], path: Path) -> Iterator[list[str]]:
    """Return csv.reader of the lines of a .csv or .tsv file. Quotes of .tsv are part of the text.

    Raises: csv.Error for damage.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    is_tsv = path.suffix.lower() == ".tsv"
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
    return csv.reader(lines, strict=True, **style)


def parse_object(content: bytes | str) -> dict[str, Any]:
    """Parse a JSON object. Raises: ValueError for anything else, such as nested too deeply."""
    try:
        record = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    return record


def read_object(file: Path) -> dict[str, Any]:
    """Parse the JSON object in a file. Raises: ValueError as parse_object; OSError."""
    if file.exists() and not file.is_file():
        raise ValueError("expected a file")  # reading a pipe would wait for its writer
    return parse_object(file.read_bytes())


def check_names(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError for a name that is not known."""
    for name in given:
        if name not in known:
            raise InputError(unknown_name(kind, name, known))


def check_types(record: dict[str, Any], dataclass_type: type) -> None:
    """Raise InputError if a value does not have the type of the field with its name.

    Lists stand for tuples. Names without a field are not checked.
    """
    hints = _hints(dataclass_type)
    for name, value in record.items():
        if name in hints and not _fits(value, hints[name]):
            raise InputError(f"{name}: expected {_describe(hints[name])}, got {shorten(value)}")


@functools.cache
def _hints(dataclass_type: type) -> dict[str, Any]:
    return typing.get_type_hints(dataclass_type)


def _fits(value: object, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(_fits(x, arguments[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, arguments[0]) and _fits(x, arguments[1]) for key, x in value.items()
        )
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        # An integer stands for a float.
        is_float = isinstance(value, float) and math.isfinite(value)
        return is_float or _fits(value, int)
    if hint is int:
        return isinstance(value, int) and abs(value) < _LARGEST
    if hint is str:
        return isinstance(value, str) and "\0" not in value  # no file name has it
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def shorten(value: object) -> str:
    """Return the repr of a value, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
