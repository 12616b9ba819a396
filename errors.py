"""The exceptions that users see, and the words that their messages share."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """Bad input from outside: the command prints it as one line and exits with status 2.

    The message says what was expected, what was found and what to do.
    """


class NoMemoryError(MemoryError):
    """The device or the system ran out of memory; the message says what to do about it."""


class DivergedError(InputError):
    """The training diverged: the loss, the gradients or the weights are not finite."""


class StopRequested(BaseException):
    """A signal asks the program to stop. No `except Exception` catches it.

    Args:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class InterruptedRun(Exception):  # noqa: N818 - a requested stop is not an error
    """A signal or the time limit stopped the run, after it wrote a checkpoint if it had a step.

    Args:
        number: the signal; SIGALRM for the time limit.
        folder: of the run. None: not known here.
    """

    def __init__(self, number: int, folder: object = None):
        super().__init__(number, folder)
        self.number = number
        self.folder = folder

    def __str__(self) -> str:
        hint = f"; continue with tritium.load({str(self.folder)!r}).resume()" if self.folder else ""
        return f"the run was stopped by signal {self.number}{hint}"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is in no table: `unknown recipe 'gtp2'; did you mean 'gpt2'?`"""
    known = list(known)
    hint = did_you_mean(name, known) or f"; expected one of {', '.join(known)}"
    return f"unknown {kind} {name!r}{hint}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the end of a message, `; did you mean 'gpt2'?`, or "" if no known name is similar."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_positive(options: object, *names: str) -> None:
    """Raise InputError for an option below 1. None is allowed."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name}: expected 1 or more, got {value}")


def plural(count: float, noun: str, digits: str = ",") -> str:
    """Return a number with its noun: `1 step`, `2,000 steps`."""
    number = f"{count:{digits}}"
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def describe_os_error(error: OSError) -> str:
    """The system's description of a file error, with the file's name where it is known."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def check_utf8(path: object) -> None:
    """Raise InputError if a path has bytes that are not UTF-8: safetensors cannot read from it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode("utf-8", "replace").decode()
        raise InputError(f"{shown}: expected a path in UTF-8; choose another name") from None


@contextlib.contextmanager
def names_file(path: object) -> Iterator[None]:
    """Add the name of a file to errors of the context: open() names it, write() does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
