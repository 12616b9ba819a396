import pytest

from tritium.errors import InputError
from tritium.model.folder import new_folder, write_json

pytestmark = pytest.mark.plain


def test_a_folder_is_written_as_a_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        write_json(folder / "x.json", {"y": 1})
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x.json").read_text() == '{\n  "y": 1\n}\n'
    with pytest.raises(KeyError), new_folder(tmp_path / "c" / "d"):
        raise KeyError
    assert not (tmp_path / "c").exists()


def test_a_folder_in_use_raises(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="expected a new or empty folder"), new_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
