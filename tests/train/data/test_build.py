"""Building a dataset: splits, end-of-text, the record, determinism, failures."""

import dataclasses
import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tritium.errors import InputError
from tritium.train.data import _new_folder, _split_writer
from tritium.train.data import build as module
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.data.documents.corpus import Corpus
from tritium.train.storage.lock import LOCK_FILE, FolderLock
from tritium.train.terminal.progress import console

pytestmark = pytest.mark.plain

DATA = Path(os.environ.get("TRITIUM_DATA") or Path(__file__).parents[3].parent / "shared" / "data")


def _documents(count):
    return [f"Document {i} says {i * i}: größer?\n" for i in range(count)]


def _jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _split_texts(dataset, split):
    """The documents of a split, separated at end-of-text."""
    stream = getattr(dataset, split)
    tokens = stream.read(0, len(stream))
    ends = np.flatnonzero(tokens == dataset.tokenizer.end_of_text)
    assert ends[-1] == len(tokens) - 1
    return [
        dataset.tokenizer.decode(part[part != dataset.tokenizer.end_of_text])
        for part in np.split(tokens, ends[:-1] + 1)
    ]


@pytest.fixture
def many(tmp_path):
    return _jsonl(tmp_path / "many.jsonl", _documents(300))


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:300"])
def test_documents_are_split_in_order_and_counted(tmp_path, many, tokenizer):
    info = build(tmp_path / "out", [many], tokenizer, progress=False)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.info == info
    assert info.tokenizer == tokenizer
    assert info.vocab_size == dataset.tokenizer.vocab_size
    train, val = _split_texts(dataset, "train"), _split_texts(dataset, "val")
    assert sorted(train + val) == sorted(_documents(300))
    assert train == [text for text in _documents(300) if text in set(train)]
    # 300 documents held out with p = 0.1: mean 30, standard deviation 5.2. The hash is fixed.
    assert 15 <= len(val) <= 45
    for split, texts in ((info.train, train), (info.val, val)):
        assert split.documents == len(texts)
        assert split.bytes == sum(len(text.encode()) for text in texts)
    assert info.train.tokens == len(dataset.train)


def test_split_does_not_depend_on_document_order(tmp_path, many):
    build(tmp_path / "forward", [many], "bytes", progress=False)
    back = _jsonl(tmp_path / "back.jsonl", _documents(300)[::-1])
    build(tmp_path / "back", [back], "bytes", progress=False)
    forward, back = (
        _split_texts(open_dataset(tmp_path / name), "val") for name in ("forward", "back")
    )
    assert forward == back[::-1]


def test_two_builds_write_the_same_bytes(tmp_path, many):
    for name in ("one", "two"):
        build(tmp_path / name, [many], "bpe:300", progress=False)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["dataset.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_tokens_do_not_depend_on_shard_or_batch_size(tmp_path, many, monkeypatch):
    build(tmp_path / "one", [many], "bytes", progress=False)
    monkeypatch.setattr(module, "_PART_CHARACTERS", 7)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 500)
    info = build(tmp_path / "two", [many], "bytes", shard_tokens=1000, progress=False)
    assert len(info.train.shards) == -(-info.train.tokens // 1000) > 5
    one, two = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "two")
    for split in ("train", "val"):
        a, b = getattr(one, split), getattr(two, split)
        np.testing.assert_array_equal(a.read(0, len(a)), b.read(0, len(b)))
    assert dataclasses.replace(info.train, shards=[]) == dataclasses.replace(
        one.info.train, shards=[]
    )


def test_one_document_is_split_by_characters(tmp_path):
    text = "é".join(str(i) for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    info = build(tmp_path / "out", [tmp_path / "book.txt"], "chars", progress=False)
    dataset = open_dataset(tmp_path / "out")
    seam = int(len(text) * 0.9)
    assert dataset.tokenizer.decode(dataset.train.read(0, len(dataset.train))) == text[:seam]
    assert dataset.tokenizer.decode(dataset.val.read(0, len(dataset.val))) == text[seam:]
    assert (info.train.documents, info.val.documents) == (1, 1)
    assert info.train.bytes + info.val.bytes == len(text.encode())


def test_few_documents_are_split_by_characters_with_end_of_text_between(tmp_path):
    for name, text in (("a", "a" * 50), ("b", "b" * 30), ("c", "c" * 20)):
        (tmp_path / f"{name}.txt").write_text(text)
    for held_out, train, val in (
        (0.3, "a" * 50 + "|" + "b" * 20, "b" * 10 + "|" + "c" * 20),
        (0.2, "a" * 50 + "|" + "b" * 30 + "|", "c" * 20),
        (0.1, "a" * 50 + "|" + "b" * 30 + "|" + "c" * 10, "c" * 10),
    ):
        out = tmp_path / f"out{held_out}"
        info = build(
            out,
            [tmp_path / f"{name}.txt" for name in "abc"],
            "bytes",
            held_out=held_out,
            progress=False,
        )
        dataset = open_dataset(out)
        found = [
            dataset.tokenizer.decode(s.read(0, len(s))).replace("<|endoftext|>", "|")
            for s in (dataset.train, dataset.val)
        ]
        assert found == [train, val]
        assert info.train.documents == sum(letter in train for letter in "abc")
        assert info.val.documents == sum(letter in val for letter in "abc")


def test_record_counts_duplicates_skipped_files_and_tokens(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("alpha " * 50)
    (source / "b.md").write_text("beta " * 50)
    (source / "c.py").write_text("gamma = 1\n" * 30)
    _jsonl(source / "d.jsonl", ["delta " * 20, "alpha " * 50])
    with gzip.open(source / "e.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "epsilon " * 9}) + "\n")
    (source / "f.txt").write_bytes(b"\0\1")
    (source / "g.bin").write_bytes(b"\0\1")
    info = build(tmp_path / "out", [source], "bytes", progress=False)
    assert (info.duplicates_dropped, info.files_skipped) == (1, 1)
    assert info.inputs == [str(source)]
    assert (
        json.loads((tmp_path / "out" / "dataset.json").read_text())["train"]["tokens"]
        == info.train.tokens
    )
    # Five documents, with four end-of-text tokens between them.
    assert info.train.tokens + info.val.tokens == info.train.bytes + info.val.bytes + 4


def test_tinyshakespeare_has_the_usual_split(tmp_path):
    source = DATA / "tinyshakespeare.txt"
    if not source.exists():
        pytest.skip(f"needs {source.name} in ../shared/data or $TRITIUM_DATA")
    info = build(tmp_path / "out", [source], "chars", progress=False)
    assert (info.train.tokens, info.val.tokens, info.vocab_size) == (1_003_854, 111_540, 66)


# --- errors


def test_out_dir_in_use_raises_and_is_unchanged(tmp_path, many):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("out", "file"):
        with pytest.raises(InputError, match="which is in use; choose another"):
            build(tmp_path / name, [many], "bytes", progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out" / "mine.txt").unlink()
    build(tmp_path / "out", [many], "bytes", progress=False)
    assert len(open_dataset(tmp_path / "out").train)


def test_out_dir_below_a_file_raises_and_names_the_file(tmp_path, many):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match=r"expected a folder, got the file .*file; choose"):
        build(tmp_path / "file" / "out", [many], "bytes", progress=False)
    assert (tmp_path / "file").read_text() == "keep"


def test_the_path_of_out_dir_may_have_bytes_that_are_not_utf8(tmp_path, many):
    build(tmp_path / "k\udcef" / "out", [many], "bytes", progress=False)
    assert len(open_dataset(tmp_path / "k\udcef" / "out").train)


def test_a_failed_build_leaves_no_folder_behind_and_deletes_no_other(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": ')
    (tmp_path / "empty").mkdir()
    for parent in ("a", "empty"):
        out = tmp_path / parent / "b" / "out"
        with pytest.raises(InputError, match="expected one JSON object per line"):
            build(out, [tmp_path / "bad.jsonl"], "bytes", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "empty"]
    assert not os.listdir(tmp_path / "empty")


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 2, float("nan")])
def test_held_out_outside_0_to_1_raises(tmp_path, many, held_out):
    with pytest.raises(InputError, match="held_out: expected a number between 0 and 1"):
        build(tmp_path / "out", [many], "bytes", held_out=held_out, progress=False)


def test_empty_split_raises_and_leaves_no_file(tmp_path, many):
    for held_out, split in ((1e-9, "val"), (1 - 1e-9, "train")):
        with pytest.raises(InputError, match=f"expected text for the {split} split"):
            build(tmp_path / "out", [many], "bytes", held_out=held_out, progress=False)
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(InputError, match="expected text for the train split"):
        build(tmp_path / "out", [tmp_path / "short.txt"], "bytes", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl", "short.txt"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError()]
)
@pytest.mark.parametrize("where", ["write_shard", "write_whole", "from_spec"])
def test_any_failure_leaves_no_file(tmp_path, many, monkeypatch, error, where):
    def fail(*_, **__):
        raise error

    place = _split_writer if where == "write_shard" else module
    monkeypatch.setattr(place, where, fail)
    with pytest.raises(type(error)):
        build(tmp_path / "out", [many], "bytes", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["many.jsonl"]


def test_interrupt_while_reading_leaves_no_file(tmp_path, many, monkeypatch):
    documents = Corpus.documents

    def interrupted(self):
        for number, document in enumerate(documents(self)):
            if number == 150:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(Corpus, "documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", [many], "bytes", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["many.jsonl"]


def test_a_terminal_shows_a_bar_per_pass(tmp_path, many, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_file", output)
    build(tmp_path / "out", [many], "bpe:300")
    for label in ("learning vocabulary", "tokenizing"):
        assert re.search(rf"{label} .* 100%", output.getvalue())


def test_the_bar_of_tokenizing_follows_what_is_encoded(tmp_path, many, monkeypatch):
    shown = []
    monkeypatch.setattr(module._Progress, "encoded", lambda _, count: shown.append(count))
    monkeypatch.setattr(module, "_PART_CHARACTERS", 1_000)
    build(tmp_path / "out", [many], "bytes", threads=1, progress=False)
    assert len(shown) > 3
    assert shown == sorted(shown)
    assert shown[-1] == many.stat().st_size


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_no_file(tmp_path, many):
    program = (
        "import resource, sys\n"
        "from tritium.train.data.build import build\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n    build(sys.argv[1], [sys.argv[2]], 'bytes')\n"
        "except OSError as error:\n    sys.exit(7)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out"), str(many)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stdout == done.stderr == ""  # stderr is not a terminal: no progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["many.jsonl"]


def test_folders_of_killed_builds_are_deleted(tmp_path):
    """A folder without the lock of a build is not touched, nor is the folder of a running build."""
    (tmp_path / "a.txt").write_text("some words " * 100)
    for name in (".killed.x1.tmp", ".running.x2.tmp", ".other.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-00000.bin").touch()
    (tmp_path / ".killed.x1.tmp" / ".lock").touch()
    with FolderLock(tmp_path / ".running.x2.tmp"):
        build(tmp_path / "out", [tmp_path / "a.txt"], "bytes", progress=False)
        assert not (tmp_path / "out" / ".lock").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.txt", "out", ".running.x2.tmp", ".other.tmp"}


def test_the_build_that_ends_first_stays_in_a_shared_folder(tmp_path):
    out = tmp_path / "out"
    slow = _new_folder.new_locked_folder(out)
    folder = slow.__enter__()
    with _new_folder.new_locked_folder(out) as fast:
        (fast / "x").touch()
    assert (folder / LOCK_FILE).exists()
    with pytest.raises(OSError, match=r"out'$"):
        slow.__exit__(None, None, None)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "x"]
