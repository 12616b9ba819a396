"""A dataset is a folder of token shards.

DIR/dataset.json      how it was built, and the shards of each split
DIR/tokenizer.json    the tokenizer of the shards
DIR/train-00000.bin   first shard of the training split; shards.py defines the format
DIR/val-00000.bin     first shard of the validation split
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..storage.files import unseal
from ..storage.records import check_types
from .documents.selection import Dropped
from .shards import TokenStream
from .tokenizers.tokenizer import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "val")


@dataclass(kw_only=True)
class SplitInfo:
    """The shards of one split, and counts of their content.

    Attributes:
        shards: file names, in order.
        tokens: number of tokens, end-of-text included.
        bytes: size of the text in UTF-8.
        documents: number of documents. A document that both splits share counts in both.
    """

    shards: list[str] = field(default_factory=list)
    tokens: int = 0
    bytes: int = 0
    documents: int = 0


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of dataset.json."""

    format_version: int
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    train: SplitInfo
    val: SplitInfo
    held_out: float
    duplicates_dropped: int
    files_skipped: int
    inputs: list[str]
    text_field: str = "text"
    filters: dict[str, float | str] = field(default_factory=dict)
    near_duplicates: float = 0.0
    weights: list[float] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An open dataset. `train` and `val` are the token ids in its shards."""

    path: Path
    tokenizer: Tokenizer
    info: DatasetInfo
    train: TokenStream
    val: TokenStream


def open_dataset(path: Path | str) -> Dataset:
    """Open a folder that `build` wrote and check every file.

    Raises: InputError if the folder is not a dataset, has another version, is damaged, or holds
        files of several datasets; OSError if a file cannot be read.
    """
    path = Path(path)
    info = read_info(path)
    if not (path / "tokenizer.json").exists():
        raise InputError(
            f"{path}: expected tokenizer.json next to dataset.json, found none; delete this folder "
            "and build it again"
        )
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    if tokenizer.sha256 != info.tokenizer_sha256:
        raise InputError(
            f"{path}: expected tokenizer {info.tokenizer_sha256[:12]}, tokenizer.json is "
            f"{tokenizer.sha256[:12]}; delete this folder and build it again"
        )
    splits = {name: _open_split(path, name, getattr(info, name), tokenizer) for name in SPLITS}
    return Dataset(path=path, tokenizer=tokenizer, info=info, **splits)


def read_info(path: Path) -> DatasetInfo:
    """Read dataset.json only.

    Raises: InputError if the file is missing, has another version or was not written by tritium.
    """
    file = path / "dataset.json"
    if not file.is_file():
        raise InputError(
            f"{path}: expected a dataset folder with dataset.json, found none; make one with "
            "`tritium data build`"
        )
    try:
        content = unseal(file.read_bytes())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            splits = {split: _split_info(content[split]) for split in SPLITS}
            parts = splits | {"dropped": [_dropped(each) for each in content.get("dropped", [])]}
            check_types(content | parts, DatasetInfo)
            return DatasetInfo(**content | parts)
    except InputError as error:
        raise InputError(f"{file}: {error}; delete its folder and build it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: expected a dataset.json of tritium, got something else ({error}); delete "
            "its folder and build it again"
        ) from None
    raise InputError(
        f"{file}: expected dataset version {FORMAT_VERSION}, got {version}; delete its folder and "
        "build it again"
    )


def _dropped(content: dict[str, Any]) -> Dropped:
    if not isinstance(content, dict):
        raise TypeError(f"expected an object for dropped documents, got {content!r}")
    check_types(content, Dropped)
    return Dropped(**content)


def _split_info(content: dict[str, Any]) -> SplitInfo:
    if not isinstance(content, dict):
        raise TypeError(f"expected an object for a split, got {content!r}")
    check_types(content, SplitInfo)
    info = SplitInfo(**content)
    for name in info.shards:
        # A path would lead out of the folder.
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise InputError(f"shards: expected names of files, got {name!r}")
    if not info.shards or info.bytes < 1:
        raise InputError("expected one shard or more, and text, got none")
    return info


def _open_split(path: Path, split: str, info: SplitInfo, tokenizer: Tokenizer) -> TokenStream:
    files = [path / name for name in info.shards]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path}: expected shard {missing[0]}, found none; copy it again, or delete this "
            "folder and build it again"
        )
    stream = TokenStream.open(
        files, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size
    )
    if len(stream) != info.tokens:
        raise InputError(
            f"{path}: expected {info.tokens} {split} tokens, its shards hold {len(stream)}; delete "
            "this folder and build it again"
        )
    return stream
