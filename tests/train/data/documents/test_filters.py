"""Each filter drops what it names; thresholds are parsed and checked."""

import builtins

import pytest

from tritium.errors import InputError
from tritium.train.data.documents.filters import (
    FILTERS,
    apply_filters,
    describe_filters,
    parse_filters,
)
from tritium.train.data.documents.text_batch import TextBatch

pytestmark = pytest.mark.plain

PROSE = (
    "The union is strong because its citizens work, save and teach, and because the law protects "
    "them all. We have paid a part of the debt, we have built roads and harbors, and no nation "
    "threatens our shores today."
)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("length", PROSE[:199]),
        ("repetition", "buy it now and pay less today " * 20),
        ("symbols", "{(1)}, [*x]; " * 30),
        pytest.param(
            "language",
            "Die Regierung hat heute ein neues Gesetz vorgestellt, das alle betrifft.",
            marks=pytest.mark.slow,  # py3langid reads its model for 3 s
        ),
    ],
)
def test_filter_drops_bad_text_and_keeps_prose(name, bad):
    if name == "language":
        pytest.importorskip("py3langid")
    _, drops = apply_filters(TextBatch([PROSE, bad]), parse_filters([name]))[name]
    assert drops.tolist() == [False, True]


def test_value_at_the_threshold_is_kept():
    batch = TextBatch(["x" * 9, "x" * 10])
    _, drops = apply_filters(batch, {"length": 10})["length"]
    assert drops.tolist() == [True, False]


def test_thresholds_are_parsed():
    words = ["length=500", "symbols", "language=de"]
    assert parse_filters(words) == {"length": 500, "symbols": 0.3, "language": "de"}
    for name, row in FILTERS.items():
        assert f"{name}={row.usual}" in describe_filters()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lenght", "unknown filter 'lenght'; did you mean 'length'"),
        ("length=x", "filter length: expected a number from 0 to 1e.12, got 'x'; 200 is usual"),
        ("length=nan", "expected a number from 0"),
        ("symbols=1.5", "filter symbols: expected a number from 0 to 1, got '1.5'"),
        ("language=", "filter language: expected a word such as en, got ''"),
    ],
)
def test_bad_filters_raise(word, message):
    with pytest.raises(InputError, match=message):
        parse_filters([word])


def test_language_without_its_package_raises(monkeypatch):
    original_import = builtins.__import__

    def import_without(name, *rest):
        if name == "py3langid":
            raise ImportError(name)
        return original_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", import_without)
    with pytest.raises(InputError, match="expected the package py3langid"):
        apply_filters(TextBatch([PROSE]), {"language": "en"})
