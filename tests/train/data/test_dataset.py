"""open_dataset opens what build wrote and raises for any other folder, with the reason."""

import json
import shutil

import pytest

from tritium.errors import InputError
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset, read_info
from tritium.train.storage.files import seal, unseal

pytestmark = pytest.mark.plain


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark and stormy night.\n" * 20)
    build(tmp_path / "out", [tmp_path / "book.txt"], "bytes", shard_tokens=100, progress=False)
    return tmp_path / "out"


def test_open_dataset_returns_what_was_built(folder):
    dataset = open_dataset(str(folder))
    assert dataset.path == folder
    assert len(dataset.train) == dataset.info.train.tokens == 576
    assert dataset.info.train.shards == [f"train-{i:05d}.bin" for i in range(6)]
    assert (
        dataset.tokenizer.decode(dataset.train.read(95, 105))
        == ("It was a dark and stormy night.\n" * 20)[95:105]
    )
    assert read_info(folder) == dataset.info


def test_folder_without_dataset_json_raises(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            InputError, match=r"expected a dataset folder with dataset.json, found none"
        ):
            open_dataset(path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "train": 3, "val": {}}'],
)
def test_unrelated_dataset_json_raises(folder, content):
    (folder / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=r"expected a dataset.json of tritium"):
        open_dataset(folder)


def test_other_version_raises(folder):
    file = folder / "dataset.json"
    file.write_bytes(seal(unseal(file.read_bytes()) | {"format_version": 9}))
    with pytest.raises(InputError, match="expected dataset version 1, got 9"):
        open_dataset(folder)


def test_changed_record_raises(folder):
    """The reported bits per byte depend on the counts in dataset.json."""
    file = folder / "dataset.json"
    content = json.loads(file.read_text())
    content["val"]["bytes"] *= 10
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"got something else \(it does not match its checksum"):
        open_dataset(folder)


def test_missing_file_raises(folder):
    shutil.copytree(folder, folder.with_name("copy"))
    (folder / "train-00003.bin").unlink()
    with pytest.raises(InputError, match=r"expected shard train-00003.bin, found none"):
        open_dataset(folder)
    (folder.with_name("copy") / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"expected tokenizer.json next to .*; delete this folder"):
        open_dataset(folder.with_name("copy"))


def test_files_of_another_dataset_raise(folder):
    other = folder.with_name("other")
    build(other, [folder.with_name("book.txt")], "chars", shard_tokens=100, progress=False)
    mine = (folder / "tokenizer.json").read_bytes()
    shutil.copy(other / "tokenizer.json", folder)
    with pytest.raises(InputError, match=r"tokenizer.json is [0-9a-f]{12}"):
        open_dataset(folder)
    (folder / "tokenizer.json").write_bytes(mine)
    shutil.copy(other / "train-00002.bin", folder)
    with pytest.raises(InputError, match=r"train-00002.bin: expected tokens of tokenizer"):
        open_dataset(folder)
    # An undamaged shard of the same dataset, in the wrong place.
    shutil.copy(folder / "train-00005.bin", folder / "train-00002.bin")
    with pytest.raises(InputError, match="expected 576 train tokens, its shards hold 552"):
        open_dataset(folder)


def test_damaged_shard_raises(folder):
    content = bytearray((folder / "val-00000.bin").read_bytes())
    content[-1] ^= 1
    (folder / "val-00000.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"val-00000.bin: damaged"):
        open_dataset(folder)


@pytest.mark.parametrize(
    "name", ["../x.bin", "/etc/hostname", "..", ".", "a/b.bin", "a\\b.bin", "C:x.bin", ".x", ""]
)
def test_a_shard_outside_the_folder_is_never_opened(name, folder):
    """Also if dataset.json has a correct checksum."""
    (folder.parent / "x.bin").write_bytes(b"secret")
    file = folder / "dataset.json"
    content = unseal(file.read_bytes())
    content["val"]["shards"] = [name]
    file.write_bytes(seal(content))
    with pytest.raises(InputError, match=r"dataset\.json: shards: expected names of files, got"):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shards", []),
        ("shards", "ab"),
        ("shards", [3]),
        ("tokens", "x"),
        ("bytes", 0),
        ("bytes", 1e999),
        ("documents", None),
    ],
)
def test_a_mistyped_split_raises(field, value, folder):
    file = folder / "dataset.json"
    content = unseal(file.read_bytes())
    content["train"][field] = value
    file.write_bytes(seal(content))
    with pytest.raises(InputError, match=r"dataset\.json: .*expected .*build it again"):
        read_info(folder)
