"""Read and write the JSON files that hold measurements, with where, when and how they were made."""

import datetime
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, plural
from ..kernels.core.triton import HAS_TRITON, triton
from ..train.storage.files import write_whole
from . import ROOT

# Increase it when a field changes its name or meaning. Files of other formats are not read.
FORMAT = 2


def check_checkout(command: str) -> None:
    """Raise InputError unless the package is a checkout, which has docs and all results."""
    if not (ROOT / "setup.py").exists():
        raise InputError(f"{command}: expected a checkout of tritium, got an installed package")


def provenance() -> dict[str, Any]:
    """Return device, date, commit and versions of this run.

    `gpu` is None without a GPU. `commit` is the environment variable TRITIUM_COMMIT, which a copy
    without .git needs; otherwise the commit of this checkout, or None.
    """
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("TRITIUM_COMMIT") or _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if HAS_TRITON else None,
    }


def describe_provenance(record: dict[str, Any]) -> str:
    """Return where and when a record was measured, in one line."""
    place = f"{record['cpu']}, {plural(record['threads'], 'thread')}"
    if record.get("device") == "cuda":
        place = record["gpu"]
    versions = [
        f"{name} {record[name]}" for name in ("commit", "torch", "triton") if name in record
    ]
    return f"{place}; {record['date']}, {', '.join(versions)}"


def write_record(path: Path, kind: str, figures: dict[str, Any]) -> None:
    """Write a record: figures and their provenance. The file is written completely or not at all.

    Args:
        kind: the command that measured: "kernels", "codegen", "train" ...
    """
    record = {"kind": kind, "format": FORMAT, **provenance(), **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [(json.dumps(record, indent=1) + "\n").encode()])


def check_writable(name: str | None) -> Path | None:
    """Return the path of a file that can be written, or None for None. Call it before long work.

    Raises: InputError if it cannot be written.
    """
    if name is None:
        return None
    path = Path(name)
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
    """Return the kind of a record, or None for other files."""
    return _read(path).get("kind")


def read_record(path: Path, kind: str) -> dict[str, Any]:
    """Read a record. Raises: InputError for another kind or format, or a file that is not JSON."""
    record = _read(path)
    found = record.get("kind"), record.get("format")
    if found != (kind, FORMAT):
        raise InputError(
            f"{path}: expected a record of kind {kind!r}, format {FORMAT}, "
            f"got kind {found[0]!r}, format {found[1]!r}; measure again with tritium bench {kind}"
        )
    return record


def records_below(folder: Path, kinds: Container[str]) -> list[dict[str, Any]]:
    """Return the records of these kinds in a folder and below, in the order of their paths.

    A record of bench/device.sh also holds the records of its parts. They come last. The key "file"
    of a record is the path of its file.
    """
    found = {path: kind_of(path) for path in sorted(folder.rglob("*.json"))}
    records, parts = [], []
    for path, kind in found.items():
        if kind not in kinds and kind != "device":
            continue
        record = {**read_record(path, kind), "file": str(path)}
        if kind in kinds:
            records.append(record)
        if kind == "device":
            parts += [{**part, "file": str(path)} for part in record.get("records", {}).values()]
    return records + [
        part for part in parts if part.get("kind") in kinds and part.get("format") == FORMAT
    ]


def _read(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; an empty one for other files."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, IsADirectoryError):
        return {}
    return record if isinstance(record, dict) else {}


def _cpu_name() -> str:
    """Return the processor's name from Linux, or what Python knows elsewhere."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, flags=re.MULTILINE)
    return name.group(1) if name else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of this checkout, with "+changes" if tracked files differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+changes" if changes else "")


def _git(*words: str) -> str | None:
    """Return the output of a git command, or None without git or a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout.strip()
