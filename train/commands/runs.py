"""tritium runs: list runs with their size, tokens, loss, speed and status."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...errors import InputError
from .cli import parse

_LEFT = ("run", "task")  # columns of words
_DESCRIPTION = "List the runs in a folder. The loss is that of the newest evaluation."


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """Options of `tritium runs`."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[FOLDER]")]] = "runs"
    """Folder whose sub-folders are runs, or a run."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium runs`."""
    options = parse(RunsOptions, argv, prog="tritium runs", description=_DESCRIPTION)
    from ..run.models import is_published  # imports PyTorch

    folder = Path(options.folder)
    is_run = (folder / "config.json").is_file()
    folders = sorted(path.parent for path in folder.glob("*/config.json"))
    runs = [folder] if is_run else [path for path in folders if not is_published(path)]
    if not runs:
        raise InputError(f"{folder}: expected runs in this folder, found none; name another folder")
    rows = [_row(run) for run in runs]
    columns = max((list(row) for row in rows), key=len)
    rows.insert(0, {name: name for name in columns})
    widths = {name: max(len(row.get(name, "")) for row in rows) for name in columns[:-1]}
    for row in rows:
        cells = [
            f"{row.get(name, ''):{'<' if name in _LEFT else '>'}{width}}"
            for name, width in widths.items()
        ]
        print("  ".join([*cells, row["status"]]))
    return 0


def _row(run: Path) -> dict[str, str]:
    """Return the columns of a run. A run that cannot be read has its error as its status."""
    from ..run.comparison import describe_run

    try:
        return describe_run(run)
    except InputError as error:
        return {"run": str(run), "status": str(error).removeprefix(f"{run / 'config.json'}: ")}
