"""How figures are kept: JSON that says where, when and with what they were measured, read back only in the same format."""

import datetime
import json
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..kernels.core.triton import HAS_TRITON, triton
from ..train.files import write_whole

# Raised whenever a field changes its meaning: old and new figures are never compared silently.
FORMAT = 1


def provenance() -> dict[str, Any]:
    """Device, date, commit and versions of this run; `gpu` is None where there is none, `commit` outside of a checkout."""
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if HAS_TRITON else None,
    }


def write_record(path: Path, kind: str, figures: dict[str, Any]) -> None:
    """Write figures of one kind ("kernels", "codegen", "train" ...) with their provenance, the whole file or none of it."""
    record = {"kind": kind, "format": FORMAT, **provenance(), **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [(json.dumps(record, indent=1) + "\n").encode()])


def writable(path: Path) -> Path:
    """The path again, if a file can be written there; found out before the work whose result it is to hold."""
    if path.is_dir():
        raise InputError(f"{path}: expected a file that can be written, got a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(
            f"{path}: expected a file that can be written, got: {error.strerror}"
        ) from None
    return path


def kind_of(path: Path) -> str | None:
    """The kind of a record; None for files that are none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return record.get("kind") if isinstance(record, dict) else None


def read_record(path: Path, kind: str) -> dict[str, Any]:
    """Read what write_record wrote. Raises: InputError for another kind or format, or for no JSON at all."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, IsADirectoryError):
        raise InputError(
            f"{path}: expected JSON written by tritium bench {kind}, got something else"
        ) from None
    found = (record.get("kind"), record.get("format")) if isinstance(record, dict) else (None, None)
    if found != (kind, FORMAT):
        raise InputError(
            f"{path}: expected a record of kind {kind!r}, format {FORMAT}, got kind {found[0]!r}, format {found[1]!r}; "
            f"measure again with tritium bench {kind}"
        )
    return record


def _cpu() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    file = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*: (.+)$", file.read_text(), flags=re.MULTILINE)
        if file.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this file is in, "+changes" if it has any."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        done = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    if done.returncode:
        return None
    return done.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
