"""The state of a rank that its heartbeat shows to the other ranks."""

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch.distributed as dist

from ...errors import plural

_PACKAGE = str(Path(__file__).parents[2]) + os.sep
_TORCH = str(Path(dist.__file__).parents[1]) + os.sep
_COMPILERS = (f"{_TORCH}_dynamo/convert_frame.py", f"{_TORCH}_inductor/compile_fx.py")
_COLLECTIVES = (f"{_TORCH}distributed/", f"{_PACKAGE}train/distributed/")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process on one of the machines."""

    host: str
    machine: str
    """Names the host and its table of processes: containers may share the name of a host."""
    pid: int
    started: str
    """Start in ticks of the system, because process numbers are used again."""

    @classmethod
    def this(cls) -> "Process":
        """Describe this process."""
        host = socket.gethostname()
        with contextlib.suppress(OSError):
            return cls(
                host=host,
                machine=f"{host} {os.readlink('/proc/self/ns/pid')}",
                pid=os.getpid(),
                started=_stat(os.getpid())[19],
            )
        return cls(host=host, machine=host, pid=os.getpid(), started="")

    def state(self, here: "Process") -> str:
        """Return "has ended", "is stopped" or "is running"; "" if it is on another machine."""
        if self.machine != here.machine:
            return ""
        if not self.started:  # a system without /proc
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return "has ended"
            return "is running"
        try:
            fields = _stat(self.pid)
        except OSError:
            return "has ended"
        if fields[19] != self.started or fields[0] in "ZX":
            return "has ended"
        return "is stopped" if fields[0] in "Tt" else "is running"


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat, from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The state of a rank, as the rank itself reports it."""

    rank: int
    process: Process
    count: int
    """Beats so far. It stays the same if the process is stopped or the machine is lost."""
    marks: int
    """Progress marks of the main thread."""
    step: int | None
    """Steps that are complete; None before the first."""
    place: str
    """Function, file and line of the main thread."""
    in_collective: bool
    """Whether the main thread waits for other ranks."""
    is_late: bool
    """Whether the main thread has marked no progress for too long."""
    has_left: bool
    """Whether the rank has finished. Its process may end."""

    @classmethod
    def read(cls, text: bytes) -> "Beat":
        """Read a beat that another rank wrote."""
        fields = json.loads(text)
        return cls(**fields | {"process": Process(**fields["process"])})

    def last_words(self) -> str:
        """Say where the rank was last."""
        is_first = self.step is None
        step = "before the first step" if is_first else f"after {plural(self.step, 'step')}"
        return f"last words: {step}, in {self.place}"


def place() -> tuple[str, bool]:
    """Return where the main thread is in tritium, and whether it is in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    in_collective = frame is not None and frame.f_code.co_filename.startswith(_COLLECTIVES)
    for each in _stack(frame):
        if each.f_code.co_filename.startswith(_PACKAGE):
            return _describe(each.f_code, each.f_lineno), in_collective
    return "another program", in_collective


def place_of(error: BaseException) -> str:
    """Return where in tritium an error was raised."""
    found = "another program"
    entry = error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            found = _describe(entry.tb_frame.f_code, entry.tb_lineno)
        entry = entry.tb_next
    return found


def _describe(code: CodeType, line: int) -> str:
    name = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on
    return f"{name} ({code.co_filename.removeprefix(_PACKAGE)}:{line})"


def is_compiling() -> bool:
    """Return whether any thread compiles a part of the model with torch.compile."""
    return any(
        each.f_code.co_filename in _COMPILERS
        for frame in sys._current_frames().values()
        for each in _stack(frame)
    )


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
