"""Breaks a chosen file operation of a save. Imported by hooks, inside the process that saves."""

import errno
import os
import signal
import threading

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


def break_at(number: int, *, step: int, log: str, kill: bool) -> None:
    """Break one file operation of the checkpoint after `step` steps.

    Args:
        number: which operation, from 1. 0: none.
        log: file that gets one line per operation, before it happens.
        kill: end the process with SIGKILL before the operation, or in the middle of a write. False:
            let the operation fail, as on a full disk.
    """
    from tritium.train.run import saver
    from tritium.train.storage import files

    thread = threading.local()
    operations = []

    def begin(name: str, break_first=lambda: None) -> None:
        if not getattr(thread, "is_saving", False):
            return
        operations.append(name)
        with original_open(log, "a") as file:
            file.write(f"{name}\n")
        if len(operations) == number:
            break_first()
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")

    original_open = open

    def opened(*arguments, **options):
        begin("open")
        return _File(original_open(*arguments, **options), begin)

    files.open = opened
    for name in CHANGES:
        _wrap(os, name, begin)

    write_checkpoint = saver.write_checkpoint

    def noted(run, content, *arguments, **options):
        thread.is_saving = content.step == step
        try:
            write_checkpoint(run, content, *arguments, **options)
        finally:
            thread.is_saving = False

    saver.write_checkpoint = noted


class _File:
    """An open file whose writes can break, after half of the bytes."""

    def __init__(self, file, begin):
        self._file = file
        self._begin = begin

    def write(self, piece):
        def write_half():
            self._file.write(piece[: len(piece) // 2])
            self._file.flush()

        self._begin("write", write_half)
        return self._file.write(piece)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def _wrap(owner, name: str, begin) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        begin(name)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)
