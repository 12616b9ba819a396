"""write_whole leaves the old file or the new file, never a partial or a temporary file."""

import json
import os
import subprocess
import sys

import pytest

from tritium.train.storage import files

pytestmark = pytest.mark.plain


def test_pieces_are_written_in_order_and_replace_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    files.write_whole(path, [b"one", memoryview(b"two"), b""])
    assert path.read_bytes() == b"onetwo"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_large_pieces_are_written_in_several_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE_BYTES", 3)
    files.write_whole(tmp_path / "a", [b"0123456789"])
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_deletes_the_temporary_file(
    tmp_path, monkeypatch, error, call
):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(type(error)):
        files.write_whole(path, [b"new"])
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_no_file(tmp_path):
    program = (
        "import resource, sys\n"
        "from tritium.train.storage.files import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    write_whole(sys.argv[1], [bytes(1_000_000)])\n"
        "except OSError:\n    sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unseal_raises_for_a_changed_record():
    record = {"step": 20, "files": {"a": "b"}, "name": "é"}
    content = files.seal(record)
    assert files.unseal(content) == record
    assert json.loads(content)["step"] == 20
    for changed in (
        content.replace(b"20", b"60"),
        content.replace(b'"b"', b'"c"'),
        content[:-3],
        b"[]",
        b"{}",
        b"\xff",
    ):
        with pytest.raises(ValueError, match=r"checksum|JSON|Expecting|decode|delimiter"):
            files.unseal(changed)


def test_the_error_of_a_failed_write_names_the_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_whole(tmp_path / "x", [b"1"])
    assert caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows flushes no folders")
def test_a_failed_flush_closes_the_folder(tmp_path, monkeypatch):
    def fail(handle):
        failed.append(handle)
        raise OSError(5, "Input/output error")

    failed = []
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.flush_folder(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(failed[0])
