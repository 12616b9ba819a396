"""Datasets on disk: a folder of token shards and the way from it to arrays.

DIR/dataset.json      what it was built from and with, and the shards of each split
DIR/tokenizer.json    the tokenizer whose ids the shards hold
DIR/train-00000.bin   shards (see shards.py) ...
DIR/val-00000.bin     ... of both splits
"""

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError
from ..files import unseal
from .shards import TokenStream
from .tokenizer import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "val")


@dataclass(kw_only=True)
class SplitInfo:
    """shards: file names in order.   tokens: end-of-text included.   bytes: of UTF-8 text.   documents: whole or in part."""

    shards: list[str] = field(default_factory=list)
    tokens: int = 0
    bytes: int = 0
    documents: int = 0


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What dataset.json holds."""

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


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An open dataset; train and val are arrays of token ids over mapped files."""

    path: Path
    tokenizer: Tokenizer
    info: DatasetInfo
    train: TokenStream
    val: TokenStream


def open_dataset(path: Path | str) -> Dataset:
    """Open a folder that `build` wrote, checking every file.

    Raises:  InputError if it is no dataset, of another version, damaged, or put together from several; OSError if unreadable.
    """
    path = Path(path)
    info = read_info(path)
    if not (path / "tokenizer.json").exists():
        raise InputError(
            f"{path}: expected tokenizer.json beside dataset.json, found none; delete its folder and build it again"
        )
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    if tokenizer.sha256 != info.tokenizer_sha256:
        raise InputError(
            f"{path}: expected tokenizer {info.tokenizer_sha256[:12]}, tokenizer.json is {tokenizer.sha256[:12]}; "
            "delete its folder and build it again"
        )
    return Dataset(
        path=path,
        tokenizer=tokenizer,
        info=info,
        **{split: _open_split(path, split, getattr(info, split), tokenizer) for split in SPLITS},
    )


def read_info(path: Path) -> DatasetInfo:
    """Read dataset.json alone. Raises: InputError if it is missing, of another version or not ours."""
    file = path / "dataset.json"
    if not file.is_file():
        raise InputError(
            f"{path}: expected a dataset folder with dataset.json, found none; make one with `tritium data build`"
        )
    try:
        content = unseal(file.read_bytes())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return DatasetInfo(
                **{**content, **{split: SplitInfo(**content[split]) for split in SPLITS}}
            )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: expected a dataset.json of tritium, got something else ({error!r}); delete its folder and build it again"
        ) from None
    raise InputError(
        f"{file}: expected dataset version {FORMAT_VERSION}, got {version}; delete its folder and build it again"
    )


def _open_split(path: Path, split: str, info: SplitInfo, tokenizer: Tokenizer) -> TokenStream:
    files = [path / name for name in info.shards]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"{path}: expected shard {missing[0]}, found none; copy it again, or delete its folder and build it again"
        )
    stream = TokenStream.open(files, tokenizer_sha256=tokenizer.sha256)
    if len(stream) != info.tokens:
        raise InputError(
            f"{path}: expected {info.tokens} {split} tokens, its shards hold {len(stream)}; delete it and build it again"
        )
    return stream
