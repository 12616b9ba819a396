from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tritium.errors import InputError
from tritium.train.storage.records import (
    check_names,
    check_types,
    csv_rows,
    parse_object,
    shorten,
)

pytestmark = pytest.mark.plain


@dataclass
class Options:
    size: int
    rate: float
    flag: bool
    name: str | None
    mode: Literal["a", "b"]
    files: tuple[str, ...]
    counts: dict[str, int]


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b"", b"{", b"\xff", b"[" * 100_000, '{"a":' * 9999]
)
def test_anything_but_an_object_raises(content):
    with pytest.raises(ValueError, match=r"JSON|Expect|nested|decode"):
        parse_object(content)


def test_values_of_the_right_types_pass():
    record = {"size": 3, "rate": 1, "flag": True, "name": None, "mode": "a", "files": ["x"]}
    check_types(record | {"counts": {"x": 1}, "unknown": object()}, Options)
    check_types({"rate": 1e300, "name": "x", "files": ("x", "y")}, Options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"size": True}, "size: expected int, got True"),
        ({"size": 1.0}, r"size: expected int, got 1\.0"),
        ({"size": 2**63}, "size: expected int, got 9223"),
        ({"rate": float("inf")}, "rate: expected float, got inf"),
        ({"rate": "1"}, "rate: expected float, got '1'"),
        ({"flag": 1}, "flag: expected bool, got 1"),
        ({"name": 5}, "name: expected str . None, got 5"),
        ({"name": "a\0b"}, "name: expected"),
        ({"mode": "c"}, "mode: expected 'a' or 'b', got 'c'"),
        ({"mode": ["a"]}, "mode: expected"),
        ({"files": "abc"}, "files: expected"),
        ({"files": [3]}, "files: expected"),
        ({"counts": {"x": None}}, "counts: expected"),
        ({"name": ["x" * 999]}, r"name: .*\.\.\.$"),
    ],
)
def test_other_values_raise(record, message):
    with pytest.raises(InputError, match=message):
        check_types(record, Options)


def test_unknown_names_raise():
    check_names("field", ["a"], ["a", "b"])
    with pytest.raises(InputError, match="unknown field 'stepz'; did you mean 'steps'"):
        check_names("field", {"stepz": 1}, ["steps"])


def test_a_long_value_is_cut():
    assert shorten("x" * 100) == f"'{'x' * 56}..."
    assert shorten("x" * 58) == f"'{'x' * 58}'"


@pytest.mark.parametrize(
    ("name", "line", "row"),
    [
        ("a.tsv", '"a, b"\tc', ['"a, b"', "c"]),
        ("a.TSV", '"a, b"\tc', ['"a, b"', "c"]),
        ("a.csv", '"a, b\t",c', ["a, b\t", "c"]),
    ],
)
def test_quotes_are_part_of_the_text_in_tsv_only(name, line, row):
    assert list(csv_rows([line], Path(name))) == [row]
