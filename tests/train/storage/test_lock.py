import errno
import os
import signal

import pytest

from tritium.errors import InputError
from tritium.train.storage import lock
from tritium.train.storage.lock import LOCK_FILE, FolderLock, delete_abandoned

pytestmark = pytest.mark.plain


def hold_in_another_process(folder) -> int:
    """Fork a process that takes the lock and then sleeps. Returns: its id."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = FolderLock(folder)
        os.write(writer, b"x")
        signal.pause()
        held.release()
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


def test_a_lock_ends_with_its_process_and_names_it(tmp_path):
    pid = hold_in_another_process(tmp_path)
    try:
        with pytest.raises(
            InputError, match=rf"but process {pid} on \S+ has been writing it since 20"
        ):
            FolderLock(tmp_path)
        (tmp_path / LOCK_FILE).write_bytes(b"[" * 5000)
        with pytest.raises(InputError, match="but another process is writing it"):
            FolderLock(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with FolderLock(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()


@pytest.mark.parametrize("make", ["link", "folder", "pipe"])
def test_a_lock_file_that_is_no_plain_file_raises(make, tmp_path):
    file = tmp_path / LOCK_FILE
    if make == "link":
        file.symlink_to(tmp_path / "target")
    elif make == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    with pytest.raises(InputError, match=r"\.lock: expected a file or nothing; delete it"):
        FolderLock(tmp_path)
    assert not (tmp_path / "target").exists()


def test_release_deletes_an_empty_folder_only(tmp_path):
    empty, full = tmp_path / "empty", tmp_path / "full"
    for folder in (empty, full):
        folder.mkdir()
    (full / "a").touch()
    for folder in (empty, full):
        FolderLock(folder).release()
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "a"]


@pytest.mark.parametrize("reason", ["this system has no locks", "its file system has no locks"])
def test_a_system_without_locks_is_told(reason, tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    if reason.startswith("this system"):
        monkeypatch.setattr(lock, "fcntl", None)
    else:

        def unsupported(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with FolderLock(tmp_path) as held:
        held.check()
        assert held.problem == reason
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_abandoned_folders_are_deleted(tmp_path):
    for name in (".dead.tmp", ".alive.tmp", ".other.tmp", "normal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").touch()
    for name in (".dead.tmp", "normal"):
        (tmp_path / name / LOCK_FILE).touch()
    with FolderLock(tmp_path / ".alive.tmp"):
        delete_abandoned(tmp_path, ".*.tmp")
    assert {path.name for path in tmp_path.iterdir()} == {".alive.tmp", ".other.tmp", "normal"}
