"""Token shards of llm.c and modded-nanogpt: read as a dataset, and written from one.

    offset  bytes  field (little endian)
    0       4      magic, which tells the type of the tokens
    4       4      version
    8       4      number of tokens
    12      1012   zeros
    1024    ...    tokens

    tokens  magic     version
    uint16  20240520  1
    uint32  20240801  7, which llm.c writes for Llama 3

The files have no checksum and do not name their tokenizer. `tritium data build OUT_DIR
fineweb10B/ --tokenizer gpt2` copies them into a dataset that has both. Files with `val` in their
names are the validation split. If there are none, the last `held_out` fraction of the tokens is.

End-of-text begins a document in these files, and ends it in a dataset that tritium builds from
text. `export_bins` moves it.
"""

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from ..storage.files import seal, write_whole
from ._new_folder import check_unused, new_locked_folder
from ._split_writer import SplitWriter
from .dataset import FORMAT_VERSION, SPLITS, Dataset, DatasetInfo
from .shards import PIECE_TOKENS, token_dtype
from .tokenizers.tokenizer import from_spec, needs_corpus
from .verify import piece_bytes

_HEADER_BYTES = 1024
_FIELDS = struct.Struct("<iii")
_EXPORTED_TOKENS = 10**8  # as fineweb.py of llm.c


class _Format(NamedTuple):
    """A row of _FORMATS."""

    magic: int
    version: int
    dtype: np.dtype


_FORMATS = (_Format(20240520, 1, np.dtype("<u2")), _Format(20240801, 7, np.dtype("<u4")))


class _Bin(NamedTuple):
    """A .bin file whose header was read."""

    path: Path
    dtype: np.dtype
    count: int


def find_bins(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the token shards that the inputs name; [] if no input is a token shard.

    A folder with .bin files stands for these files.

    Raises: InputError if only some of the inputs are token shards.
    """
    found, others = [], []
    for given in map(Path, inputs):
        paths = [given]
        if given.is_dir():
            bins = sorted(path for path in given.glob("*.bin") if not path.name.startswith("."))
            paths = bins or paths
        for path in paths:
            (found if is_bin(path) else others).append(path)
    if found and others:
        raise InputError(
            f"data: expected token shards only, or none, got the token shard {found[0]} and "
            f"{others[0]}, which is not one; leave one of the two out"
        )
    return found


def is_bin(path: Path) -> bool:
    """Return whether a file begins as the shards of llm.c and modded-nanogpt do."""
    if path.suffix != ".bin" or not path.is_file():
        return False
    with open(path, "rb") as file:
        magic = file.read(4)
    return any(magic == struct.pack("<i", each.magic) for each in _FORMATS)


def build_from_bins(
    out_dir: Path, paths: Sequence[Path], spec: str, *, held_out: float, shard_tokens: int
) -> DatasetInfo:
    """Copy .bin files to a dataset folder.

    Args:
        out_dir: a folder that does not exist or is empty.
        paths: the files.
        spec: the tokenizer that wrote them.
        held_out: fraction of the tokens for the validation split, if no file is named for it.
        shard_tokens: maximum number of tokens per shard.
    Raises: InputError for damaged files, or tokens outside the vocabulary.
    """
    if needs_corpus(spec):
        raise InputError(
            "tokenizer: expected the one that wrote the token shards, such as gpt2 or "
            f"FILE.tiktoken, got {spec}"
        )
    check_unused(out_dir)
    made = from_spec(spec, list)
    bins = [_open(path) for path in paths]
    parts = {"train": [each for each in bins if "val" not in each.path.name]}
    parts["val"] = [each for each in bins if "val" in each.path.name]
    with new_locked_folder(out_dir) as folder:
        writers = {split: SplitWriter(folder, split, made, shard_tokens) for split in SPLITS}
        sizes = piece_bytes(made)
        total = sum(each.count for each in bins)
        left = total if parts["val"] else int(total * (1 - held_out))  # still to write to train
        for split in SPLITS:
            for each in parts[split]:
                for tokens in _read(each, made.vocab_size):
                    head = tokens[:left] if split == "train" else tokens[:0]
                    left -= len(head)
                    writers["train"].add_tokens(head, sizes)
                    writers["val"].add_tokens(tokens[len(head) :], sizes)
        inputs = [str(path) for path in paths]
        info = DatasetInfo(
            format_version=FORMAT_VERSION,
            tokenizer=made.name,
            tokenizer_sha256=made.sha256,
            vocab_size=made.vocab_size,
            **{split: writers[split].close(inputs) for split in SPLITS},
            held_out=held_out,
            duplicates_dropped=0,
            files_skipped=0,
            inputs=inputs,
        )
        made.save(folder / "tokenizer.json")
        write_whole(folder / "dataset.json", [seal(dataclasses.asdict(info))])
    return info


def _open(path: Path) -> _Bin:
    """Read the header of a .bin file. Raises: InputError if it does not match the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise InputError(
            f"{path}: cut short: expected a header of {_HEADER_BYTES} bytes, got {size}; get the "
            "file again"
        )
    magic, version, count = _FIELDS.unpack_from(header)
    found = next(each for each in _FORMATS if each.magic == magic)
    if count < 0:
        raise InputError(f"{path}: expected 0 tokens or more, got {count:,}; get the file again")
    expected = _HEADER_BYTES + count * found.dtype.itemsize
    if version != found.version or size != expected:
        raise InputError(
            f"{path}: expected version {found.version} and {expected:,} bytes for {count:,} "
            f"tokens, got version {version} and {size:,} bytes; get the file again"
        )
    return _Bin(path, found.dtype, count)


def _read(file: _Bin, vocab_size: int) -> Iterator[np.ndarray]:
    """Yield the tokens of a .bin file in pieces."""
    with open(file.path, "rb") as content:
        content.seek(_HEADER_BYTES)
        for start in range(0, file.count, PIECE_TOKENS):
            tokens = np.fromfile(content, file.dtype, min(PIECE_TOKENS, file.count - start))
            if len(tokens) and int(tokens.max()) >= vocab_size:
                raise InputError(
                    f"{file.path}: expected tokens below {vocab_size}, the size of the "
                    f"vocabulary, got {tokens.max()}; give the tokenizer that wrote the file"
                )
            yield tokens


def read_bin(path: Path, vocab_size: int) -> np.ndarray:
    """Return the tokens of a .bin file, (n,) uint16 or uint32.

    Raises: InputError if the file is damaged or has a token that is not below `vocab_size`.
    """
    file = _open(path)
    return np.concatenate([np.empty(0, file.dtype), *_read(file, vocab_size)])


# --- export


def export_bins(
    dataset: Dataset, out_dir: Path, *, shard_tokens: int = _EXPORTED_TOKENS
) -> dict[str, int]:
    """Write a dataset as NAME_train_000000.bin, ..., NAME_val_000000.bin and tokenizer.json.

    Tokens have the dtype of `token_dtype`.

    Args:
        out_dir: a folder that does not exist or is empty. NAME is its name.
        shard_tokens: maximum number of tokens per file.
    Returns: the number of tokens of each split.
    """
    check_unused(out_dir)
    dtype = token_dtype(dataset.tokenizer.vocab_size)
    magic, version, _ = next(each for each in _FORMATS if each.dtype == dtype)
    written = {}
    with new_locked_folder(out_dir) as folder:
        for split in SPLITS:
            written[split] = 0
            for number, tokens in enumerate(_shards(dataset, split, shard_tokens, dtype)):
                path = folder / f"{out_dir.name}_{split}_{number:06d}.bin"
                header = _FIELDS.pack(magic, version, len(tokens)).ljust(_HEADER_BYTES, b"\0")
                write_whole(path, [header, tokens.data])
                written[split] += len(tokens)
        dataset.tokenizer.save(folder / "tokenizer.json")
    return written


def _shards(
    dataset: Dataset, split: str, shard_tokens: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yield the content of each .bin file of a split. Each document begins with end-of-text."""
    stream = getattr(dataset, split)
    end = dataset.tokenizer.end_of_text
    waiting: list[np.ndarray] = []
    if stream.read(0, 1)[0] != end:
        waiting.append(np.array([end], dtype))
    is_last_end = bool(waiting) and stream.read(len(stream) - 1, len(stream))[0] == end
    count = len(stream) - is_last_end
    size = len(waiting)
    position = 0
    for tokens in stream.pieces():
        tokens = tokens[: count - position].astype(dtype)
        position += len(tokens)
        waiting.append(tokens)
        size += len(tokens)
        while size >= shard_tokens:
            joined = np.concatenate(waiting)
            yield joined[:shard_tokens]
            waiting = [joined[shard_tokens:]]
            size -= shard_tokens
    if size:
        yield np.concatenate(waiting)
