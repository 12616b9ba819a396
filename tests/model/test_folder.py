from pathlib import Path

import pytest

from tritium.errors import InputError
from tritium.model.folder import new_folder, write_json

pytestmark = pytest.mark.plain


def test_a_folder_is_written_as_a_whole_or_not_at_all(tmp_path):
    (tmp_path / "a" / ".b.tmp" / "left by a killed program").mkdir(parents=True)
    with new_folder(tmp_path / "a" / "b") as folder:
        write_json(folder / "x.json", {"y": 1})
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x.json").read_text() == '{\n  "y": 1\n}\n'
    with pytest.raises(KeyError), new_folder(tmp_path / "c" / "d"):
        raise KeyError
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("made", [0, 1])
def test_the_error_of_mkdir_is_raised_and_nothing_stays(tmp_path, monkeypatch, made):
    mkdir = Path.mkdir

    def fail(path, mode=0o777, parents=False, exist_ok=False):
        # Path.mkdir makes the outermost parent first.
        if made:
            mkdir(tmp_path / "a")
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(PermissionError), new_folder(tmp_path / "a" / "b" / "c"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_stays_after_an_error(tmp_path, monkeypatch):
    def fail(path, target):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", fail)
    (tmp_path / "a").mkdir()
    with pytest.raises(PermissionError), new_folder(tmp_path / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_in_use_raises(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="expected a new or empty folder"), new_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_files_that_another_program_writes_meanwhile_stay(tmp_path):
    out = tmp_path / "new" / "a"
    writing = new_folder(out)
    writing.__enter__()
    out.mkdir()
    (out / "x").write_text("")
    with pytest.raises(OSError, match=r"/new/a'$"):
        writing.__exit__(None, None, None)
    assert [path.name for path in out.parent.rglob("*")] == ["a", "x"]
