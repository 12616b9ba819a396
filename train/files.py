"""Files that are written whole or not at all.

A writer that dies half way (disk full, kill -9, power) must never leave a file that looks finished: the bytes go to a temporary
name in the same folder, are flushed to the disk, and only then take the final name, which POSIX and Windows do in one step.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

_PIECE_BYTES = 1 << 26


def write_whole(path: Path | str, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` one after another to `path`, replacing what was there, whole or not at all.

    Args:    path: the final name; its folder must exist.   pieces: bytes-like, contiguous.
    Raises:  OSError (disk full, no permission); `path` is then as it was before, and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                # In steps, because one write() on Linux stops at 2 GiB and Ctrl-C should not wait for all of it.
                view = memoryview(piece).cast("B")
                for start in range(0, len(view), _PIECE_BYTES):
                    file.write(view[start : start + _PIECE_BYTES])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write, unlike a failed open, does not say where
        raise
    flush_folder(path.parent)


def seal(record: dict) -> bytes:
    """A record as indented JSON that carries its own SHA-256."""
    return json.dumps(record | {"sha256": _sum(record)}, indent=2).encode() + b"\n"


def unseal(content: bytes) -> dict:
    """The record behind `seal`. Raises: ValueError if a single bit of it is another."""
    record = json.loads(content)
    if not isinstance(record, dict) or record.pop("sha256", None) != _sum(record):
        raise ValueError("it does not match its checksum")
    return record


def _sum(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut (Windows has no such call and needs none)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
