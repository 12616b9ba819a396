from dataclasses import dataclass
from typing import Literal

import pytest

from tritium.errors import InputError
from tritium.train.commands.cli import near, parse, run

pytestmark = pytest.mark.plain


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options."""

    learning_rate: float = 0.1
    """Rate."""
    kind: Literal["round", "square"] = "round"
    """Kind."""
    names: tuple[str, ...] = ("a",)
    """Names."""


def parsed(*words):
    return parse(Options, words, prog="tritium test", description="Test.")


def test_words_become_options():
    assert parsed() == Options()
    assert parsed("--learning-rate", "3e-4", "--names", "x", "y") == Options(
        learning_rate=3e-4, names=("x", "y")
    )
    assert (
        parse(Options, [], prog="p", description="d", default=Options(kind="square")).kind
        == "square"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--learnin-rate", "3"),
            r"Unrecognized options: --learnin-rate.*near: --learning-rate; see tritium test --help",
        ),
        (
            ("--learning-rate", "fast"),
            r"could not convert string to float: 'fast'; see tritium test --help",
        ),
        (("--kind", "oval"), r"invalid choice 'oval'.*'round', 'square'"),
        (("stray",), r"Unrecognized options: stray"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(InputError, match=message) as caught:
        parsed(*words)
    assert "\n" not in str(caught.value)
    assert not any(corner in str(caught.value) for corner in "│╭─")
    assert capsys.readouterr().err == ""


def test_near_words():
    assert near("sampel", ["train", "sample"]) == "sample"
    assert near("zzz", ["train", "sample"]) == "train, sample"


def test_statuses(capsys):
    def failing(error):
        def command(argv):
            raise error

        return command

    assert run(lambda argv: None, []) == 0
    assert run(failing(InputError("bad\nthing")), []) == 2
    assert capsys.readouterr().err == "tritium: bad thing\n"
    assert run(failing(OSError(28, "No space left on device", "/x/y")), []) == 2
    assert capsys.readouterr().err == "tritium: /x/y: No space left on device\n"
    assert run(failing(KeyboardInterrupt()), []) == 130
    capsys.readouterr()
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ):
        assert run(failing(error), []) == 2
        assert capsys.readouterr().err.startswith("tritium: out of memory: ")
    with pytest.raises(ZeroDivisionError):  # a bug stays a traceback
        run(failing(ZeroDivisionError()), [])
