"""prepare returns a dataset as it is and builds other inputs once."""

import os

import pytest

from tritium.errors import InputError
from tritium.train.config import TrainConfig
from tritium.train.data import prepare as module
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.data.loader import Loader, evaluation_batches
from tritium.train.data.prepare import prepare, prepare_for

pytestmark = pytest.mark.plain


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "my book.txt"
    path.write_text("It was a dark and stormy night.\n" * 20)
    return path


def test_text_file_becomes_batches(tmp_path, book):
    dataset = open_dataset(prepare([str(book)], "bytes", tmp_path / "cache", progress=False))
    tokens, targets = (
        Loader(dataset.train, context_tokens=32, batch_size=2, seed=0).batch(0).on("cpu")
    )
    for row, target in zip(tokens, targets, strict=True):
        assert dataset.tokenizer.decode(row) == "It was a dark and stormy night.\n"
        assert dataset.tokenizer.decode(target[:-1]) == "t was a dark and stormy night.\n"
    assert sum(map(len, evaluation_batches(dataset.val, context_tokens=32, batch_size=8))) == 2


def test_same_request_is_built_once(tmp_path, book, monkeypatch):
    cache = tmp_path / "cache"
    path = prepare([str(book)], "bytes", cache, progress=False)
    assert path.parent == cache
    assert path.name.startswith("my-book-bytes-")
    monkeypatch.setattr(module, "build", lambda *_, **__: pytest.fail("built again"))
    assert prepare([str(book)], "bytes", cache, progress=False) == path


def test_the_dataset_of_a_run_has_its_options(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "It was a dark and stormy night."}\n')
    options = {"tokenizer": "bytes", "held_out": 0.5, "text_field": "body"}
    config = TrainConfig.from_options(data=(str(file),), **options)
    dataset = open_dataset(prepare_for(config, progress=False))
    assert dataset.path.is_relative_to(tmp_path / "cache")
    assert (len(dataset.train), len(dataset.val)) == (15, 16)


def test_other_options_or_changed_files_give_another_folder(tmp_path, book):
    cache = tmp_path / "cache"
    paths = [
        prepare([str(book)], "bytes", cache, progress=False),
        prepare([str(book)], "chars", cache, progress=False),
        prepare([str(book)], "bytes", cache, held_out=0.2, progress=False),
    ]
    book.write_text("It was bright.\n" * 50)
    os.utime(book, ns=(1, 1))
    paths.append(prepare([str(book)], "bytes", cache, progress=False))
    assert len(set(paths)) == 4
    assert (
        open_dataset(paths[3]).tokenizer.decode(open_dataset(paths[3]).train.read(0, 6)) == "It was"
    )
    assert sorted(path.name for path in cache.iterdir()) == sorted(path.name for path in paths)


def test_dataset_is_returned_as_it_is(tmp_path, book):
    build(tmp_path / "out", [book], "chars", progress=False)
    for tokenizer in (None, "chars"):
        assert prepare([str(tmp_path / "out")], tokenizer, tmp_path / "cache") == tmp_path / "out"
    for tokenizer in ("bytes", "bpe:4096"):
        with pytest.raises(
            InputError, match=f"expected a dataset of tokenizer {tokenizer}, this one has chars"
        ):
            prepare([str(tmp_path / "out")], tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_dataset_with_another_vocabulary_size_raises(tmp_path, book):
    build(tmp_path / "out", [book], "bpe:270", progress=False)
    assert prepare([str(tmp_path / "out")], "bpe:270", tmp_path) == tmp_path / "out"
    with pytest.raises(InputError, match="bpe:271"):
        prepare([str(tmp_path / "out")], "bpe:271", tmp_path)


def test_tokenizer_files_are_compared_by_content(tmp_path, book):
    import base64

    ranks = [tmp_path / "one.tiktoken", tmp_path / "two.tiktoken"]
    lines = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    for path in ranks:
        path.write_bytes(lines)
    made = prepare([str(book)], str(ranks[0]), tmp_path / "cache", progress=False)
    assert made.name.startswith("my-book-one-")
    assert prepare([str(made)], str(ranks[1]), tmp_path / "cache") == made
    ranks[1].write_bytes(lines + b"YWI= 256\n")
    with pytest.raises(InputError, match=r"this one has one.tiktoken"):
        prepare([str(made)], str(ranks[1]), tmp_path / "cache")
    ranks[0].write_bytes(lines + b"YWI= 256\n")
    assert prepare([str(book)], str(ranks[0]), tmp_path / "cache", progress=False) != made


def test_dataset_built_by_another_process_meanwhile_is_used(tmp_path, book, monkeypatch):
    rename = os.rename

    def rename_too_late(source, target):
        rename(source, target)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(os, "rename", rename_too_late)
    path = prepare([str(book)], "bytes", tmp_path / "cache", progress=False)
    assert len(open_dataset(path).train) == 576

    def disk_full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", disk_full)
    with pytest.raises(OSError, match="No space"):
        prepare([str(book)], "chars", tmp_path / "cache", progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_bad_inputs_raise(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        prepare([str(tmp_path / "none.txt")], "bytes", tmp_path / "cache")
    with pytest.raises(InputError, match="at least one input"):
        prepare([], None, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
