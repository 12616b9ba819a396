import io
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from tritium.errors import InputError
from tritium.train.commands.cli import as_flags, parse, program, run

pytestmark = pytest.mark.plain


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options."""

    learning_rate: float = 0.1
    """Rate."""
    shape: Literal["round", "square"] = "round"
    """Shape."""
    names: tuple[str, ...] = ("a",)
    """Names."""


def parsed(*words):
    return parse(Options, words, prog="tritium test", description="Test.")


def raising(error):
    def command(argv):
        raise error

    return command


@dataclass(frozen=True, kw_only=True)
class Words:
    """Options with a positional argument."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run or
    a checkpoint."""
    steps: int = 1
    """Steps."""


@dataclass(frozen=True, kw_only=True)
class OtherOptions:
    """Options whose names are those of `tritium train`."""

    lr: float = 0.1
    """Rate."""


def test_names_of_other_trainers_suggest_ours():
    message = r"Unrecognized options: --learning_rate.*did you mean --lr\?; see"
    with pytest.raises(InputError, match=message):
        parse(OtherOptions, ["--learning_rate", "1"], prog="p", description="d")


def test_words_become_options():
    assert parsed() == Options()
    assert parsed("--learning-rate", "3e-4", "--names", "x", "y") == Options(
        learning_rate=3e-4, names=("x", "y")
    )


def test_default_gives_the_values_of_missing_options():
    default = Options(shape="square")
    assert parse(Options, [], prog="p", description="d", default=default) == default


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--learnin-rate", "3"),
            r"Unrecognized options: --learnin-rate.*did you mean --learning-rate\?; see",
        ),
        (
            ("--learning-rate", "fast"),
            r"^--learning-rate: expected a number, got 'fast'; see tritium test --help",
        ),
        (("--shape", "oval"), r"invalid choice 'oval'.*'round', 'square'"),
        (("stray",), r"Unrecognized options: stray"),
    ],
)
def test_wrong_words_raise_one_line(words, message, capsys):
    with pytest.raises(InputError, match=message) as caught:
        parsed(*words)
    assert "\n" not in str(caught.value)
    assert not any(corner in str(caught.value) for corner in "│╭─")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected MODEL: A run or a checkpoint; see tritium test --help"),
        (("m", "--steps", "2.5"), "--steps: expected an integer, got '2.5'; see tritium test"),
    ],
)
def test_a_missing_argument_and_a_wrong_integer_say_what_is_expected(words, message):
    with pytest.raises(InputError, match=f"^{message}"):
        parse(Words, words, prog="tritium test", description="Test.")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("lr: expected 0 or more, got -1", "--lr: expected 0 or more, got -1"),
        ("give more `warmup_steps`", "give more --warmup-steps"),
        ("choose another `out`, or `resume` it", "choose another --out, or --resume it"),
        ("use `wandb login`", "use `wandb login`"),
        ("data: expected text, got none", "data: expected text, got none"),
        ("rms_norm: expected a tensor", "rms_norm: expected a tensor"),
    ],
)
def test_option_names_in_messages_become_flags(message, expected):
    assert as_flags(message) == expected


def test_options_of_the_parsed_command_become_flags():
    parsed()
    assert as_flags("learning_rate: expected 1") == "--learning-rate: expected 1"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("bad\nthing"), "tritium: bad thing\n"),
        (InputError("lr: expected 1"), "tritium: --lr: expected 1\n"),
        (
            OSError(28, "No space left on device", "/x/y"),
            "tritium: /x/y: No space left on device\n",
        ),
    ],
)
def test_errors_that_users_can_correct_exit_with_2_and_one_line(error, line, capsys):
    assert run(raising(error), []) == 2
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")],
)
def test_out_of_memory_exits_with_2(error, capsys):
    assert run(raising(error), []) == 2
    assert capsys.readouterr().err.startswith("tritium: out of memory: ")


def test_ctrl_c_exits_with_130():
    assert run(raising(KeyboardInterrupt()), []) == 130


def test_command_without_status_exits_with_0():
    assert run(lambda argv: None, []) == 0


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), [])


def test_a_terminal_without_a_character_gets_a_question_mark(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert run(lambda argv: print("größer"), []) == 0
    assert stream.buffer.getvalue().decode().split() == ["gr??er"]


@pytest.mark.parametrize(
    ("called", "found", "expected"),
    [
        ("/env/bin/tritium", "/env/bin/tritium", "tritium"),
        ("/env/bin/tritium", "/other/bin/tritium", "/env/bin/tritium"),
        ("/env/bin/tritium", None, "/env/bin/tritium"),
        ("/repository/tritium/__main__.py", "/env/bin/tritium", "python -m tritium"),
    ],
)
def test_hints_start_the_program_that_was_called(called, found, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("shutil.which", lambda name: found)
    assert program() == expected
