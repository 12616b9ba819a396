"""Parse a command's options, and turn errors into one line on stderr.

Modules that take long to import are imported inside functions, so that `tritium --help` is quick.
"""

import contextlib
import gc
import io
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar, get_type_hints

from ...errors import InputError, NoMemoryError, describe_os_error
from ..terminal.console import is_local_rank0, print_from_handler

Options = TypeVar("Options")
_NO_COMPILER = (
    "--compile: expected a working C++ compiler, found none; install g++, or start again with "
    "--compile off"
)
_NO_MEMORY = (
    "out of memory: give smaller sizes, such as --micro-batch-size, --context-tokens, --d-model "
    "or --shape"
)
# Names that other trainers give to our options.
_OTHER_NAMES = {
    "batch-tokens": "batch-size",
    "block-size": "context-tokens",
    "learning-rate": "lr",
    "log-every": "log-interval",
    "logging-steps": "log-interval",
    "max-iters": "steps",
    "max-steps": "steps",
    "n-embd": "d-model",
    "seq-len": "context-tokens",
    "train-steps": "steps",
    "warmup-iters": "warmup-steps",
}
# Messages of tyro and Python, and our words for them.
_OUR_WORDS = (
    (r"^Error parsing ([A-Za-z][\w.-]*: (GPTConfig: )?)?", ""),
    (r"^Missing from [^:]+: (\S+) (.+?)\.? \(required\)$", r"expected \1: \2"),
    (r"invalid literal for int\(\) with base 10: ", "expected an integer, got "),
    (r"could not convert string to float: ", "expected a number, got "),
)
# Options that commands read before they parse the others.
_NAMES_WITHOUT_FIELD = {"resume"}
# Exit status of a program whose output is read no further: 128 + SIGPIPE.
_BROKEN_PIPE = 141
# Names of the options that the commands of this process have parsed.
_option_names: set[str] = set()


def parse(
    options: type[Options],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default: Options | None = None,
) -> Options:
    """Fill a dataclass from `--key value` words. `--help` prints the help and exits.

    Args:
        options: dataclass. Its fields are the options, and their docstrings are the help texts.
        argv: words after the name of the command.
        prog: name of the command, for messages.
        description: first lines of the help.
        default: the values of options that argv does not have.
    Raises: InputError in one line for an unknown option or a value of the wrong type.
    """
    import tyro

    _option_names.update(_names(options))
    printed = io.StringIO()
    keywords = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed), paused_collector():
            return tyro.cli(
                options, args=list(argv), prog=prog, description=description, **keywords
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(printed.getvalue(), prog)) from None


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running. Imports and parsers keep what they create."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_help(argv: Sequence[str]) -> bool:
    """Return whether `parse` would print the help and exit."""
    return "-h" in argv or "--help" in argv


def _names(options: type) -> Iterator[str]:
    """Yield the options of a dataclass, and of the dataclasses in it."""
    hints = get_type_hints(options)
    for field in fields(options):
        if is_dataclass(hints[field.name]):
            yield from _names(hints[field.name])
        else:
            yield field.name


def _one_line(box: str, prog: str) -> str:
    """Take the message and the suggested options out of the box that tyro prints.

    The box has a title, the message, and suggestions, separated by horizontal rules. The title is
    in the upper edge, or above the first rule if the terminal is ASCII only.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in plain.splitlines()]
    has_title_in_edge = lines[0].startswith("╭")
    if has_title_in_edge:
        lines[0] = "─"
    groups = [
        list(group)
        for is_rule, group in itertools.groupby(lines, lambda line: set(line) <= set("─-╰╯"))
        if not is_rule
    ]
    message, *others = groups if has_title_in_edge else groups[1:]
    text = " ".join(message).rstrip(".")
    for pattern, ours in _OUR_WORDS:
        text = re.sub(pattern, ours, text)
    if "nrecognized" in text:
        known = {name.replace("_", "-") for name in _option_names}
        given = [word.replace("_", "-") for word in re.findall(r"--([\w-]+)", text)]
        ours = [_OTHER_NAMES[name] for name in given if _OTHER_NAMES.get(name) in known]
        near = [line.split()[0] for group in others for line in group if line.startswith("--")]
        near = [f"--{name}" for name in ours] or near
        if near:
            text += f"; did you mean {' or '.join(dict.fromkeys(near))}?"
    return f"{text}; see {prog} --help"


def as_flags(message: str) -> str:
    """Spell the options in a message as flags: `lr` in backticks, and a leading "lr: ".

    A leading "data: " names the part of the program, not the option.
    """
    from ..config import PART_OF

    names = _option_names | set(PART_OF) | _NAMES_WITHOUT_FIELD

    def flag(match: re.Match) -> str:
        name = match[1]
        return f"--{name.replace('_', '-')}" if name in names else match[0]

    message = re.sub(r"^(?!data:)(\w+)(?=: )", flag, message)
    return re.sub(r"`(\w+)`", flag, message)


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command. Print an error that the user can correct as one line on stderr.

    Returns: the exit status: 0; 2 for bad input, a full disk or too little memory; 130 for Ctrl-C;
        141 if the reader of the output is gone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may have ASCII only
    try:
        status = command(argv) or 0
        sys.stdout.flush()
        return status
    except InputError as error:
        if not is_local_rank0():  # all ranks of a node raise the same error
            return 2
        message = as_flags(str(error))
    except (MemoryError, RuntimeError) as error:
        if "No working C++ compiler" in str(error):
            message = _NO_COMPILER
        elif is_out_of_memory(error):
            message = str(error) if isinstance(error, NoMemoryError) else _NO_MEMORY
        else:
            raise
    except BrokenPipeError:
        # Python flushes the output again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        message = describe_os_error(error)
    except KeyboardInterrupt:
        print_from_handler("tritium: interrupted")
        return 130
    _print_error("tritium: " + " ".join(message.split()))
    return 2


def _print_error(line: str) -> None:
    """Print a line on stderr, if it still has a reader."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that a device or the system has no memory left."""
    import torch

    phrases = ("not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    )


def program() -> str:
    """Return how the user called this program, for hints that can be pasted into a shell."""
    name = Path(sys.argv[0])
    if name.name != "tritium":
        return "python -m tritium"
    return "tritium" if shutil.which("tritium") == str(name.resolve()) else sys.argv[0]
