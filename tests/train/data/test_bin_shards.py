"""Token shards of llm.c are copied into a dataset and written from one, without a change."""

import base64
import os

import numpy as np
import pytest

from tritium.errors import InputError
from tritium.train.data.bin_shards import export_bins, find_bins
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.data.documents.selection import SelectionOptions
from tritium.train.data.prepare import prepare
from tritium.train.data.verify import verify_dataset

pytestmark = pytest.mark.plain

END = 256  # the end-of-text id of the tokenizer `bytes`


def _write(path, tokens, version=1, count=None):
    """As write_datafile of llm.c: 256 int32 of header, then uint16 tokens."""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, np.uint16).tobytes())
    return path


def _tokens(text):
    return list(text.encode())


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    _write(folder / "x_val_000000.bin", [END, *_tokens("held out")])
    _write(folder / "x_train_000001.bin", [END, *_tokens("one"), END, *_tokens("tw")])
    _write(folder / "x_train_000002.bin", [*_tokens("o"), END, *_tokens("größe")])
    return folder


def test_shards_become_a_dataset(tmp_path, shards):
    """With a file for validation, no other text is held out, for any value of held_out."""
    info = build(tmp_path / "out", [shards], "bytes", held_out=0.5, progress=False)
    dataset = open_dataset(tmp_path / "out")
    text = dataset.tokenizer.decode(dataset.train.read(0, len(dataset.train)))
    assert text.split("<|endoftext|>") == ["", "one", "two", "größe"]
    assert (info.train.documents, info.train.bytes) == (3, 6 + len("größe".encode()))
    assert (info.val.documents, info.val.bytes, info.val.tokens) == (1, 8, 9)
    verify_dataset(tmp_path / "out")


def test_without_a_validation_file_the_last_tokens_are_held_out(tmp_path):
    path = _write(tmp_path / "a.bin", [*range(100)])
    build(tmp_path / "out", [path], "bytes", held_out=0.25, shard_tokens=30, progress=False)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.train.read(0, 75).tolist() == [*range(75)]
    assert dataset.val.read(0, 25).tolist() == [*range(75, 100)]


def test_train_copies_shards_once(tmp_path, shards):
    path = prepare([str(shards)], "bytes", tmp_path / "cache", progress=False)
    assert prepare([str(shards)], "bytes", tmp_path / "cache", progress=False) == path
    os.utime(shards / "x_train_000001.bin", ns=(1, 1))
    assert prepare([str(shards)], "bytes", tmp_path / "cache", progress=False) != path


@pytest.mark.parametrize("shard_tokens", [7, 100])
def test_exported_shards_come_back_unchanged(tmp_path, shards, shard_tokens):
    build(tmp_path / "one", [shards], "bytes", progress=False)
    written = export_bins(open_dataset(tmp_path / "one"), tmp_path / "x", shard_tokens=shard_tokens)
    assert written == {"train": 16, "val": 9}
    if shard_tokens == 7:
        assert (tmp_path / "x" / "x_train_000001.bin").is_file()
    build(tmp_path / "two", [tmp_path / "x"], "bytes", progress=False)
    for split in ("train", "val"):
        a, b = (getattr(open_dataset(tmp_path / name), split) for name in ("one", "two"))
        np.testing.assert_array_equal(a.read(0, len(a)), b.read(0, len(b)))


def test_export_moves_end_of_text_to_the_start_of_documents(tmp_path):
    lines = "".join(f'{{"text": "document {i}"}}\n' for i in range(200))
    (tmp_path / "a.jsonl").write_text(lines)
    build(tmp_path / "one", [tmp_path / "a.jsonl"], "bytes", progress=False)
    dataset = open_dataset(tmp_path / "one")
    export_bins(dataset, tmp_path / "x")
    content = (tmp_path / "x" / "x_train_000000.bin").read_bytes()
    assert np.frombuffer(content, np.int32, 3).tolist() == [20240520, 1, len(dataset.train)]
    tokens = np.frombuffer(content, np.uint16, offset=1024)
    expected = dataset.train.read(0, len(dataset.train))
    np.testing.assert_array_equal(tokens[1:], expected[:-1])
    assert tokens[0] == expected[-1] == END


def test_exported_tokens_have_16_bits_if_the_vocabulary_fits(tmp_path, shards, monkeypatch):
    build(tmp_path / "one", [shards], "bytes", progress=False)
    dataset = open_dataset(tmp_path / "one")
    for vocab_size, magic in ((1 << 16, 20240520), ((1 << 16) + 1, 20240801)):
        monkeypatch.setattr(dataset.tokenizer, "vocab_size", vocab_size)
        export_bins(dataset, tmp_path / str(vocab_size))
        path = tmp_path / str(vocab_size) / f"{vocab_size}_val_000000.bin"
        assert np.fromfile(path, np.int32, 1) == magic


def test_find_bins_knows_them_by_their_magic(tmp_path, shards):
    assert [path.name for path in find_bins([shards])] == sorted(os.listdir(shards))
    assert find_bins([shards / "x_val_000000.bin", shards])
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"other")
    for inputs in ([tmp_path / "a.txt"], [tmp_path / "b.bin"]):
        assert find_bins(inputs) == []
    assert find_bins(["stdlib"]) == find_bins([]) == []


def test_hidden_files_are_no_shards(shards):
    """A copy from macOS may have one beside each file."""
    (shards / "._x_train_000001.bin").write_bytes(b"other")
    assert len(find_bins([shards])) == 3


def test_shards_with_other_things_raise_and_name_both(tmp_path, shards):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"x_train_000001\.bin and .*a\.txt, which is not one"):
        build(tmp_path / "out", [shards, tmp_path / "a.txt"], "bytes", progress=False)
    (tmp_path / "texts").mkdir()
    with pytest.raises(InputError, match=r"and .*texts, which is not one"):
        build(tmp_path / "out", [shards, tmp_path / "texts"], "bytes", progress=False)
    (shards / "x_train_000003.bin").write_bytes(b"other")
    with pytest.raises(InputError, match=r"and .*x_train_000003\.bin, which is not one; leave"):
        build(tmp_path / "out", [shards], "bytes", progress=False)
    assert not (tmp_path / "out").exists()


def test_bad_shards_raise(tmp_path, shards):
    for tokens, change, message in (
        ([1, 2], {"count": 3}, r"expected version 1 and 1,030 bytes for 3 tokens, got .* 1,028"),
        ([1, 2], {"count": 1}, r"1,026 bytes for 1 tokens, got version 1 and 1,028 bytes"),
        ([], {"count": -5}, "expected 0 tokens or more, got -5"),
        ([1, 2], {"version": 7}, "got version 7"),
        ([1, 257], {}, "expected tokens below 257, the size of the vocabulary, got 257"),
    ):
        path = _write(tmp_path / "bad.bin", tokens, **change)
        with pytest.raises(InputError, match=message):
            build(tmp_path / "out", [path], "bytes", progress=False)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cut short: expected a header of 1024 bytes, got 100"):
        build(tmp_path / "out", [path], "bytes", progress=False)
    with pytest.raises(InputError, match="tokenizer: expected the one that wrote the token shards"):
        build(tmp_path / "out", [shards], "bpe:4096", progress=False)
    options = SelectionOptions(filters={"length": 3})
    with pytest.raises(InputError, match="expected no filters"):
        build(tmp_path / "out", [shards], "bytes", selection=options, progress=False)
    assert not (tmp_path / "out").exists()


def test_large_vocabularies_have_32_bits_per_token(tmp_path):
    """In the format that llm.c writes for Llama 3. End-of-text is token 65,792 here."""
    pieces = [bytes([i]) for i in range(256)] + [i.to_bytes(3, "big") for i in range(1 << 16)]
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    spec = tmp_path / "large.tiktoken"
    spec.write_bytes(b"".join(lines))
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    build(tmp_path / "out", sorted(tmp_path.glob("*.txt")), str(spec), progress=False)
    dataset = open_dataset(tmp_path / "out")
    export_bins(dataset, tmp_path / "x")
    content = (tmp_path / "x" / "x_train_000000.bin").read_bytes()
    tokens = np.frombuffer(content, np.uint32, offset=1024)
    assert np.frombuffer(content, np.int32, 3).tolist() == [20240801, 7, len(tokens)]
    assert tokens[0] == dataset.tokenizer.end_of_text == 65_792
    assert dataset.tokenizer.decode(tokens[1:7]).startswith("text ")

    build(tmp_path / "again", [tmp_path / "x"], str(spec), progress=False)
    again = open_dataset(tmp_path / "again").train
    np.testing.assert_array_equal(again.read(0, len(again)), tokens)
    expected = dataset.train.read(0, len(dataset.train))
    np.testing.assert_array_equal(tokens[1:], expected)  # it ends in the middle of a document
    (tmp_path / "x" / "x_train_000000.bin").write_bytes(content[:-1])
    with pytest.raises(InputError, match="expected version 7 and"):
        build(tmp_path / "third", [tmp_path / "x"], str(spec), progress=False)
