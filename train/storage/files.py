"""Write files atomically, and JSON records that carry a checksum.

A process that dies while it writes (full disk, kill -9, power cut) must not leave a file that looks
complete. So the bytes go to a temporary file in the same folder, are flushed to the disk, and the
temporary file is then renamed to the final name. A rename is atomic on POSIX and on Windows.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...errors import InputError, names_file
from .records import parse_object

_PIECE_BYTES = 1 << 26


def write_whole(path: Path | str, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces`, one after another, to `path`: the whole file or nothing.

    Args:
        path: the final name. Its folder must exist. An existing file is replaced.
        pieces: contiguous bytes-like objects.
    Raises: OSError (disk full, no permission), which names `path`. `path` is then unchanged, and
        the temporary file is deleted.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_flushed(temporary, pieces)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        raise
    flush_folder(path.parent)


def write_flushed(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` to `path` and flush them to the disk. A failed write leaves a partial file.

    Raises: OSError, which names `path`.
    """
    with names_file(path), open(path, "wb") as file:
        for piece in pieces:
            # Linux writes at most 2 GiB per call, and Ctrl-C waits for the end of the call.
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), _PIECE_BYTES):
                file.write(view[start : start + _PIECE_BYTES])
        file.flush()
        os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            found.update(piece)
    return found.hexdigest()


def check_free_space(folder: Path, need_bytes: float, purpose: str, hint: str) -> None:
    """Raise InputError if the file system of `folder` has less than `need_bytes` bytes free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise InputError(
            f"{folder}: expected {need_bytes / 1e9:.3g} GB of free disk space for {purpose}, got "
            f"{free_bytes / 1e9:.3g} GB; {hint}"
        )


def seal(record: dict) -> bytes:
    """Return `record` as indented JSON with one more key, the SHA-256 of the record."""
    return json.dumps(record | {"sha256": _sha256(record)}, indent=2).encode() + b"\n"


def unseal(content: bytes) -> dict:
    """Return the record that `seal` wrote. Raises: ValueError if the content was changed."""
    record = parse_object(content)
    if record.pop("sha256", None) != _sha256(record):
        raise ValueError("it does not match its checksum")
    return record


def _sha256(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def flush_folder(folder: Path) -> None:
    """Flush renames inside `folder` to the disk, so that they survive a power cut.

    Windows has no such call and does not need one.
    """
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_can_create(folder: Path) -> None:
    """Raise InputError if `folder` is a file, or below a file or a folder that is not writable."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"{folder}: expected a folder, got the file {nearest}; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"{folder}: expected a folder to write to, got {nearest} without the right to write; "
            "choose another"
        )
