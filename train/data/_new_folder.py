"""Create a dataset folder completely or not at all, while other processes build there too."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from ...model.folder import whole_folder
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
def new_locked_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder, as `whole_folder` does, with a name of its own.

    The lock of the folder tells other builds that it is in use. They delete folders without a lock,
    which killed builds left behind.
    """
    delete_abandoned(out_dir.parent, ".*.tmp")
    suffix = f".{secrets.token_hex(4)}.tmp"
    with whole_folder(out_dir, suffix) as temporary, FolderLock(temporary):
        yield temporary
    flush_folder(out_dir.parent)
