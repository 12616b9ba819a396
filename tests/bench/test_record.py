import json
from pathlib import Path

import pytest
import torch

from tritium.bench import record
from tritium.bench.record import check_writable, kind_of, provenance, read_record, write_record
from tritium.errors import InputError

pytestmark = pytest.mark.plain


def test_a_record_is_read_back_with_its_provenance(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_record(path, "kernels", {"rows": [1, 2]})
    found = read_record(path, "kernels")
    assert found["rows"] == [1, 2]
    assert found["torch"] == torch.__version__
    assert set(provenance()) <= set(found)


def test_kind_of_is_none_for_other_files(tmp_path):
    write_record(tmp_path / "x.json", "train", {})
    (tmp_path / "y.json").write_text("not json")
    (tmp_path / "z.json").write_text("[1]")
    kinds = [kind_of(tmp_path / name) for name in ("x.json", "y.json", "z.json")]
    assert kinds == ["train", None, None]


def test_check_writable_leaves_no_file_behind(tmp_path):
    path = tmp_path / "new" / "a.json"
    assert check_writable(str(path)) == path
    assert check_writable(None) is None
    assert not list(path.parent.iterdir())


def test_check_writable_raises_for_folders_and_impossible_paths(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    expected = "expected a file that can be written, got"
    with pytest.raises(InputError, match=f"{expected} a folder"):
        check_writable(str(tmp_path))
    for path in (Path("/proc/a.json"), file / "a.json"):
        with pytest.raises(InputError, match=f"{expected}: "):
            check_writable(str(path))


def test_reading_another_kind_or_format_raises(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_record(path, "kernels", {})
    found = "got kind 'kernels', format 2; measure again"
    with pytest.raises(InputError, match=f"record of kind 'codegen', format 2, {found}"):
        read_record(path, "codegen")
    monkeypatch.setattr(record, "FORMAT", 3)
    with pytest.raises(InputError, match=f"record of kind 'kernels', format 3, {found}"):
        read_record(path, "kernels")


@pytest.mark.parametrize("text", ["[1, 2]", "not json", json.dumps({"rows": []})])
def test_reading_other_files_raises(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"x\.json: expected"):
        read_record(path, "kernels")


def test_a_copy_without_git_has_the_commit_of_the_environment(monkeypatch):
    monkeypatch.setenv("TRITIUM_COMMIT", "abc1234")
    assert provenance()["commit"] == "abc1234"
