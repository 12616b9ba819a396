"""One writer per folder: a lock that ends with its process, however the process ends.

The lock is flock() on the file FOLDER/.lock. The system releases it when the process dies. A killed
process leaves the file behind, but no lock, and the next writer takes the file over. The file names
its process, for the message that another process prints.

Windows has no flock(), and some network file systems do not support it. `problem` then says so, and
the folder has no lock.
"""

import contextlib
import errno
import json
import os
import platform
import shutil
import stat
import time
from pathlib import Path

from ...errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_LARGEST_FILE = 4096


class FolderLock:
    """Exclusive use of a folder by this process, until `release` or the end of the process.

    Creating a FolderLock takes the lock. It also remembers which folder it is, so that `check` can
    tell whether the folder was moved or deleted.

    Args: folder: an existing folder.
    Attributes: problem: why there is no lock. None: there is one.
    Raises: InputError, which names the process, if another process has the lock; OSError if the
        file cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._folder_handle: int | None = None
        self._file_handle: int | None = None
        self.problem: str | None = None
        if fcntl is None:
            self.problem = "this system has no locks"
            return
        self._folder_handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._file_handle = self._take()
        except BaseException:
            self.release()
            raise

    def _take(self) -> int | None:
        """Return the handle of the locked file, or None if the file system has no locks."""
        path = self.folder / LOCK_FILE
        while True:
            handle = _open_file(path, self._folder_handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process that had the lock may have deleted the file in the meantime.
                if _is_same(path, handle):
                    os.ftruncate(handle, 0)
                    os.write(handle, _describe_this_process())
                    return handle
            except BlockingIOError:
                holder = _describe_holder(handle)
                os.close(handle)
                raise InputError(
                    f"{self.folder}: expected a folder that no other process writes, but {holder}; "
                    "wait for its end, or stop it first"
                ) from None
            except OSError as error:
                os.close(handle)
                if error.errno not in _UNSUPPORTED:
                    error.filename = str(path)
                    raise
                self.problem = "its file system has no locks"
                path.unlink(missing_ok=True)
                return None
            os.close(handle)

    def check(self) -> None:
        """Take the lock again if its file was deleted.

        Raises: InputError if the path no longer names the folder that was locked, or if another
            process has taken the lock in the meantime.
        """
        if self._folder_handle is None:
            return
        if _is_same(self.folder, self._folder_handle):
            if self._file_handle is not None and not _is_same(
                self.folder / LOCK_FILE, self._file_handle
            ):
                handle = self._take()
                os.close(self._file_handle)
                self._file_handle = handle
            return
        found = "another folder" if self.folder.exists() else "none"
        raise InputError(
            f"{self.folder}: expected the folder that this process writes, found {found}: it was "
            "moved or deleted in the meantime; if it was moved, resume it where it is now"
        )

    def release(self) -> None:
        """Delete the lock's file and end the lock. Delete the folder if it is empty then."""
        if self._file_handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(LOCK_FILE, dir_fd=self._folder_handle)
            os.close(self._file_handle)
            self._file_handle = None
        if self._folder_handle is not None:
            if _is_same(self.folder, self._folder_handle):
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            os.close(self._folder_handle)
            self._folder_handle = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """Return whether a process writes the folder now. Without locks: False."""
    path = folder / LOCK_FILE
    if fcntl is None or path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def delete_abandoned(parent: Path, pattern: str) -> None:
    """Delete the temporary folders of processes that were killed.

    Args:
        parent: the folder that holds them.
        pattern: their names. Only folders with a lock file are deleted, and only if no process has
            the lock.
    """
    for folder in parent.glob(pattern) if fcntl is not None else ():
        if not folder.is_symlink() and (folder / LOCK_FILE).is_file():
            with contextlib.suppress(InputError, OSError), FolderLock(folder):
                shutil.rmtree(folder)


def _open_file(path: Path, folder: int) -> int:
    """Open or create the file of a lock. Raises: InputError if it is a link or no plain file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(LOCK_FILE, flags, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise InputError(f"{path}: expected a file or nothing; delete it") from None
        error.filename = str(path)
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{path}: expected a file or nothing; delete it")
    return handle


def _is_same(path: Path, handle: int) -> bool:
    """Whether a path names the open file or folder."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _describe_this_process() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}).encode()


def _describe_holder(handle: int) -> str:
    """Describe the process that has the lock. Its file may be empty or damaged."""
    try:
        holder = json.loads(os.pread(handle, _LARGEST_FILE, 0))
        pid, host, since = (str(holder[key]) for key in ("pid", "host", "since"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process is writing it"
    return f"process {pid} on {host} has been writing it since {since}"
