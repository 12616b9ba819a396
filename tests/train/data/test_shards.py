"""Shards round-trip; damaged shards raise; a stream reads across shards."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from tritium.errors import InputError
from tritium.train.data import shards
from tritium.train.data.shards import HEADER_BYTES, DataChanged, Shard, TokenStream, write_shard
from tritium.train.storage import files

pytestmark = pytest.mark.plain

SHA = "ab" * 32


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train-00000.bin"
    write_shard(path, np.arange(1000), 1000, SHA)
    return path


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(257, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<u4"), (1 << 32, "<u4")],
)
def test_shard_round_trips_in_the_smallest_dtype(tmp_path, vocab_size, dtype):
    tokens = np.array([0, 1, vocab_size - 1, 5], dtype=np.uint64)
    write_shard(tmp_path / "a.bin", tokens, vocab_size, SHA)
    shard = Shard(tmp_path / "a.bin", tokenizer_sha256=SHA)
    assert shard.dtype == np.dtype(dtype)
    assert len(shard) == 4
    np.testing.assert_array_equal(shard[0:4], tokens)
    assert (shard.vocab_size, shard.tokenizer_sha256) == (vocab_size, SHA)
    assert (tmp_path / "a.bin").stat().st_size == HEADER_BYTES + 4 * shard.dtype.itemsize
    with pytest.raises(ValueError, match="read-only"):
        shard[0:1][0] = 1


def test_strided_tokens_are_written_in_order(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(20)[::2], 300, SHA)
    np.testing.assert_array_equal(Shard(tmp_path / "a.bin")[0:10], np.arange(0, 20, 2))


@pytest.mark.parametrize(
    "tokens", [np.arange(0), np.zeros((2, 2), int), np.array([1000]), np.array([-1])]
)
def test_impossible_tokens_raise(tmp_path, tokens):
    with pytest.raises(ValueError, match="write_shard: tokens must be"):
        write_shard(tmp_path / "a.bin", tokens, 1000, SHA)
    assert list(tmp_path.iterdir()) == []


def test_flipped_bit_anywhere_raises(shard):
    good = shard.read_bytes()
    for place in [*range(HEADER_BYTES), HEADER_BYTES, HEADER_BYTES + 777, len(good) - 1]:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        shard.write_bytes(bad)
        with pytest.raises(InputError, match=r"train-00000.bin: .*build it again"):
            Shard(shard)
    shard.write_bytes(good)
    assert len(Shard(shard)) == 1000


def sealed(shard: bytes, place: int, value: int) -> bytes:
    """Change a field of the header and its checksum."""
    fields = shard[:place] + struct.pack("<I", value) + shard[place + 4 : 68]
    return fields + struct.pack("<I", zlib.crc32(fields)) + shard[72:]


def test_message_names_the_problem(shard):
    good = shard.read_bytes()
    flipped = bytearray(good)
    flipped[500] ^= 4
    other_version = bytearray(good)
    other_version[8:12] = struct.pack("<I", 2)
    other_version[68:72] = struct.pack("<I", zlib.crc32(other_version[:68]))
    for content, message in (
        (flipped, "damaged: expected token checksum [0-9a-f]{8}, got [0-9a-f]{8}"),
        (good[:-1], "cut short: expected 2128 bytes for 1000 tokens, got 2127"),
        (good + b"\0", "too long: expected 2128 bytes for 1000 tokens, got 2129"),
        (good[:HEADER_BYTES], "cut short"),
        (good[:50], "cut short: expected a header of 128 bytes, got 50"),
        (b"", "expected a token shard"),
        (b"#!/bin/sh\n" * 30, "expected a token shard"),
        (other_version, "expected shard version 1, got 2"),
        (good[:9] + b"\1" + good[10:], "expected shard version 1, got 257"),
        (sealed(good, 12, 4), "expected at most 2.*32 tokens, in 2 or 4 bytes each"),
        (sealed(good, 16, 999), "expected tokens below 999, got 999"),
        (good[:20] + b"\1" + good[21:], "the header does not match its checksum"),
    ):
        shard.write_bytes(content)
        with pytest.raises(InputError, match=message):
            Shard(shard)


def test_another_tokenizer_raises(shard):
    with pytest.raises(
        InputError, match="expected tokens of tokenizer cdcdcdcdcdcd, got abababababab"
    ):
        Shard(shard, tokenizer_sha256="cd" * 32)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_no_file(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(type(error)):
        write_shard(tmp_path / "a.bin", np.arange(10), 10, SHA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_no_file(tmp_path):
    program = (
        "import resource, sys\nimport numpy as np\n"
        "from tritium.train.data.shards import write_shard\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try:\n    write_shard(sys.argv[1], np.zeros(100_000, int), 10, '{SHA}')\n"
        "except OSError:\n    sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.bin")], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- shards that change while they are used


@pytest.fixture
def long_shard(tmp_path):
    """Tokens 0 to 29,999 in 60,000 bytes, which are 4 blocks."""
    path = tmp_path / "train-00000.bin"
    write_shard(path, np.arange(30_000), 30_000, SHA)
    return path


def test_any_range_of_blocks_is_read(long_shard):
    shard = Shard(long_shard)
    block = 8192  # tokens
    for start, stop in (
        (0, 1),
        (0, block),
        (block - 1, block + 1),
        (block, 2 * block),
        (block, block),
        (5, 29_999),
        (29_999, 30_000),
        (30_000, 30_000),
    ):
        np.testing.assert_array_equal(shard[start:stop], np.arange(start, stop))


def test_a_shard_that_is_cut_raises_where_it_is_cut(long_shard):
    shard = Shard(long_shard)
    with open(long_shard, "r+b") as file:
        file.truncate(40_000)
    np.testing.assert_array_equal(shard[0:100], np.arange(100))
    for start in (16_384, 29_000):
        with pytest.raises(DataChanged, match=r"train-00000\.bin: cut short while it was use"):
            shard[start : start + 10]


def test_a_shard_that_is_overwritten_raises_where_it_differs(long_shard):
    """Also if its size and its times are as before."""
    shard = Shard(long_shard)
    times = long_shard.stat()
    with open(long_shard, "r+b") as file:
        file.seek(HEADER_BYTES + 2 * 20_000)
        file.write(b"\0")
    os.utime(long_shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    np.testing.assert_array_equal(shard[0:16_384], np.arange(16_384))
    for start, stop in ((20_000, 20_001), (24_575, 24_576), (0, 30_000)):
        with pytest.raises(DataChanged, match=r"train-00000\.bin: changed while it was used"):
            shard[start:stop]


def test_a_shard_that_is_replaced_or_deleted_is_still_read(long_shard):
    shard = Shard(long_shard)
    write_shard(long_shard, np.zeros(5, int), 30_000, SHA)
    np.testing.assert_array_equal(shard[7:9], [7, 8])
    long_shard.unlink()
    np.testing.assert_array_equal(shard[7:9], [7, 8])


# --- streams


@pytest.fixture
def stream(tmp_path):
    """Tokens 0 to 999 in shards of 300, 1, 2 and 697."""
    paths = []
    for i, (start, stop) in enumerate(((0, 300), (300, 301), (301, 303), (303, 1000))):
        paths.append(tmp_path / f"{i}.bin")
        write_shard(paths[-1], np.arange(start, stop), 1000, SHA)
    return TokenStream.open(paths, tokenizer_sha256=SHA)


def test_stream_reads_across_shards(stream):
    assert len(stream) == 1000
    for start, stop in (
        (0, 1000),
        (0, 0),
        (1000, 1000),
        (299, 304),
        (300, 301),
        (300, 303),
        (302, 303),
        (999, 1000),
        (5, 9),
    ):
        np.testing.assert_array_equal(stream.read(start, stop), np.arange(start, stop))
        assert stream.read(start, stop).dtype == np.uint16
    for start, stop in ((-1, 3), (0, 1001), (5, 4)):
        with pytest.raises(IndexError, match=f"got {start}, {stop}"):
            stream.read(start, stop)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_stream_is_not_harmed_by_a_shard_that_is_cut(in_memory, long_shard, monkeypatch):
    if not in_memory:
        monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 1000)
    stream = TokenStream.open([long_shard])
    long_shard.write_bytes(b"")
    if in_memory:
        np.testing.assert_array_equal(stream.read(0, 30_000), np.arange(30_000))
    else:
        with pytest.raises(DataChanged, match="cut short"):
            stream.read(0, 1)


def test_the_pieces_of_a_stream_join_to_its_tokens():
    for length in (0, 1, 4, 8, 9):
        tokens = np.arange(length, dtype=np.uint16)
        pieces = list(TokenStream([tokens]).pieces(4))
        assert all(len(piece) == 4 for piece in pieces[:-1])
        assert np.concatenate([tokens[:0], *pieces]).tolist() == tokens.tolist()


def test_shards_with_different_vocabularies_raise(tmp_path):
    for vocab_size in (300, 70_000):
        write_shard(tmp_path / f"{vocab_size}.bin", np.arange(9), vocab_size, SHA)
    with pytest.raises(InputError, match=r"70000.bin: expected a vocabulary of 300 tokens, got"):
        TokenStream.open([tmp_path / "300.bin", tmp_path / "70000.bin"])


def test_stream_with_a_damaged_shard_raises(stream, tmp_path):
    bad = bytearray((tmp_path / "3.bin").read_bytes())
    bad[-1] ^= 1
    (tmp_path / "3.bin").write_bytes(bad)
    with pytest.raises(InputError, match=r"3.bin: damaged"):
        TokenStream.open([tmp_path / f"{i}.bin" for i in range(4)])
