"""Write a folder as a whole or not at all."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, check_utf8, names_file


def check_new_folder(folder: Path) -> None:
    """Raise InputError unless the folder is empty or does not exist, and its path is UTF-8."""
    check_utf8(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a new or empty folder; choose another name")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, as `whole_folder` does.

    Raises: InputError as `check_new_folder`.
    """
    check_new_folder(folder)
    with whole_folder(folder, ".tmp") as temporary:
        yield temporary


@contextlib.contextmanager
def whole_folder(folder: Path, suffix: str) -> Iterator[Path]:
    """Yield a temporary folder to fill. It becomes `folder` at the end of the context.

    After an error `folder` is as it was before.

    Args:
        folder: is empty or does not exist. If it has files at the end, OSError is raised.
        suffix: of the temporary folder's name. A folder that has this name already is deleted.
    """
    folder = folder.resolve()
    existed = folder.exists()
    parents = [parent for parent in folder.parents if not parent.exists()]
    temporary = folder.with_name(f".{folder.name}{suffix}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()  # Windows cannot rename over a folder
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if existed:
            folder.mkdir(exist_ok=True)
        for parent in parents:
            # mkdir may have failed before it made all of them. Another program may write there.
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def write_json(path: Path, content: dict) -> None:
    """Write a file of JSON."""
    with names_file(path):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
