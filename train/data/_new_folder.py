"""Create a folder completely or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from ..storage.files import check_can_create, flush_folder
from ..storage.lock import FolderLock, delete_abandoned


def check_unused(out_dir: Path) -> None:
    """Raise InputError unless the folder can be created, or is empty."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(
            f"data: expected a new or empty folder to build in, got {out_dir}, which is in use; "
            "choose another"
        )
    check_can_create(out_dir)


@contextlib.contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder. Rename it to `out_dir` at the end.

    After an error, delete it and the folders above it that did not exist before.

    The lock of the folder tells other builds that it is in use. They delete folders without a lock,
    which killed builds left behind.
    """
    parents = [parent for parent in out_dir.absolute().parents if not parent.exists()]
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(out_dir.parent, ".*.tmp")
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".tmp", dir=out_dir.parent)
    )
    try:
        with FolderLock(temporary):
            yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp gives access to the owner only
        if out_dir.is_dir():
            out_dir.rmdir()  # it is empty; Windows cannot rename over a folder
        os.rename(temporary, out_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # another program may have written there
            for parent in parents:
                parent.rmdir()
        raise
    flush_folder(out_dir.parent)


def _umask() -> int:
    mask = os.umask(0o022)  # the only way to read it is to set it
    os.umask(mask)
    return mask
