"""From words on the command line to typed options, and from errors to one line."""

import contextlib
import difflib
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import tyro

from ...errors import InputError, NoMemoryError, describe_os_error
from ..config import PART_OF
from ..distributed.world import is_local_rank0

Options = TypeVar("Options")
_NO_COMPILER = "--compile: expected a working C++ compiler, found none; install g++, or start anew with --compile off"
_NO_MEMORY = "out of memory: give smaller sizes, such as --micro-batch-size, --context-tokens, --d-model or --shape"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the system had no more memory to give."""
    told = ("not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


def parse(
    options: type[Options],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default: Options | None = None,
) -> Options:
    """Fill a dataclass from `--key value` words; `--help` prints its manual page and exits.

    Args:
        options: dataclass; fields are options, their docstrings the help.
        argv: words after the command's name.
        default: instance whose values stand where a word does not say otherwise.
    Raises: InputError in one line for unknown keys (with the near ones) and values of the wrong type.
    """
    shown = io.StringIO()
    keywords = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                options, args=list(argv), prog=prog, description=description, **keywords
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(shown.getvalue(), prog)) from None


def as_flags(message: str) -> str:
    """Spell the options in a message as flags: names in backticks, and a leading `lr:`.

    A leading `data:` names the part of the program, not the option.
    """

    def flag(match: re.Match) -> str:
        name = match[1]
        return f"--{name.replace('_', '-')}" if name in PART_OF else match[0]

    message = re.sub(r"^(?!data:)(\w+)(?=: )", flag, message)
    return re.sub(r"`(\w+)`", flag, message)


def near(word: str, words: Sequence[str]) -> str:
    """The words most like `word`, for a message; all of them if none is."""
    return ", ".join(difflib.get_close_matches(word, words, n=3, cutoff=0.4) or words)


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command; what a user can mend becomes one line on stderr.

    Returns: exit status: 0, 2 for bad input, a full disk or too little memory, 130 for an interruption.
    """
    try:
        return command(argv) or 0
    except InputError as error:
        if not is_local_rank0():  # of several processes all have it
            return 2
        message = as_flags(str(error))
    except (MemoryError, RuntimeError) as error:
        if "No working C++ compiler" in str(error):
            message = _NO_COMPILER
        elif is_out_of_memory(error):
            message = str(error) if isinstance(error, NoMemoryError) else _NO_MEMORY
        else:
            raise
    except OSError as error:
        message = describe_os_error(error)
    except KeyboardInterrupt:
        print("tritium: interrupted", file=sys.stderr)
        return 130
    print("tritium: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _one_line(box: str, prog: str) -> str:
    """The sentence and the suggested options out of the box that tyro draws: title, sentence, suggestions, rules between."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in plain.splitlines()]
    if lines[0].startswith("╭"):
        lines[0] = (
            "─"  # the title stands in the upper edge; where the terminal takes ASCII only, above the first rule
        )
    groups = [
        list(group)
        for is_rule, group in itertools.groupby(lines, lambda line: set(line) <= set("─-╰╯"))
        if not is_rule
    ]
    sentence, *others = groups if lines[0] == "─" else groups[1:]
    text = re.sub(r"^Error parsing [A-Za-z]\w*: ", "", " ".join(sentence)).rstrip(".")
    suggestions = [line.split()[0] for group in others for line in group if line.startswith("--")]
    if "nrecognized" in text and suggestions:
        text += f"; near: {', '.join(dict.fromkeys(suggestions))}"
    return f"{text}; see {prog} --help"
