"""The terminal: lines that never stop a run, and output whose reader may go away.

`tritium train ... | tee log` loses its reader if Ctrl-C ends tee, and a closed terminal takes no
more output. A run continues and writes its checkpoint.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

_STDERR = 2


def is_local_rank0() -> bool:
    """Return whether this process prints for its node. Without torchrun every process does."""
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def loading(*, is_quiet: bool = False) -> Iterator[None]:
    """Show on a terminal that PyTorch is being imported, while the context lasts."""
    shows = not is_quiet and is_local_rank0() and sys.stderr.isatty()
    line = "loading PyTorch ..."
    if shows:
        print(line, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shows:
            print(" " * len(line), end="\r", file=sys.stderr, flush=True)


def print_from_handler(line: str) -> None:
    """Write a line to stderr. A signal handler may call it while another line is being printed."""
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"{line}\n".encode(errors="replace"))


class _LossyFile(io.FileIO):
    """A file that drops what cannot be written."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:  # no reader, no terminal, or a full disk
            return len(data)


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Let stdout and stderr drop what cannot be written, instead of raising OSError."""
    before = sys.stdout, sys.stderr
    sys.stdout = _lossy(sys.stdout)
    sys.stderr = _lossy(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _lossy(stream: io.TextIOBase) -> io.TextIOBase:
    """Return a stream that writes to the file of `stream`, if it is a file."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # replaced by a test, or by a notebook
    try:
        stream.flush()
        raw = _LossyFile(stream.fileno(), "w", closefd=False)
    except OSError:
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
    )
