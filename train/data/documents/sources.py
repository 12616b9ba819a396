"""Corpora by name, from the network. A file or folder with the same name goes first.

    tinyshakespeare.txt                 one file, kept in the cache, checked by its SHA-256
    tinystories openwebtext             parquet files of one commit on huggingface.co, read while
    fineweb-10b fineweb-edu-10b         they arrive: nothing is kept on the disk

A learned vocabulary, near duplicates and weights read a corpus more than once, so they also
transfer it more than once. Download a large corpus for them, and name its folder.
"""

import fnmatch
import hashlib
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ....errors import InputError
from ...storage.cache import cache_dir
from ...storage.files import write_whole


@dataclass(frozen=True)
class Download:
    """One file.

    Attributes:
        url: its address.
        sha256: of its content.
        size: in bytes.
    """

    url: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Hosted:
    """The parquet files of a dataset on huggingface.co.

    Attributes:
        repository, revision: which commit.
        files: pattern of the paths in the repository.
        tokens: about how many tokens of GPT-2.
    """

    repository: str
    revision: str
    files: str
    tokens: int


SOURCES: dict[str, Download | Hosted] = {
    "tinyshakespeare.txt": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size=1_115_394,
    ),
    "tinystories": Hosted(
        "roneneldan/TinyStories",
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        "data/train-*.parquet",
        tokens=470_000_000,
    ),
    "openwebtext": Hosted(
        "Skylion007/openwebtext",
        "b4325f019c648b1641a1784748667e8b74e5e064",
        "plain_text/train-*.parquet",
        tokens=9_040_000_000,
    ),
    "fineweb-10b": Hosted(
        "HuggingFaceFW/fineweb",
        "9bb295ddab0e05d785b879661af7260fed5140fc",
        "sample/10BT/*.parquet",
        tokens=10_300_000_000,
    ),
    "fineweb-edu-10b": Hosted(
        "HuggingFaceFW/fineweb-edu",
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        "sample/10BT/*.parquet",
        tokens=10_000_000_000,
    ),
}


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Hosted corpus. It is used where a Path is read.

    Attributes:
        path: its address in the file system, with the revision.
        size: in bytes.
        file_system: an fsspec file system.
    """

    path: str
    size: int
    file_system: Any

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """The end of the name, such as .parquet."""
        return Path(self.name).suffix

    def __str__(self) -> str:
        return self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def open(self) -> BinaryIO:
        """Open the file. Parts of it are transferred when they are read."""
        return self.file_system.open(self.path, "rb")


def find_source(name: str) -> list[Path] | list[RemoteFile]:
    """Return the files of a named corpus. A Download is fetched if it is not in the cache.

    Raises: InputError without network, or for another content than expected.
    """
    source = SOURCES[name]
    if isinstance(source, Download):
        return [_fetch(name, source)]
    try:
        files = _list_files(source, _file_system())
    except InputError:
        raise
    # The network, its libraries and the server have exceptions of their own.
    except Exception as error:
        raise _unreachable(name, error) from None
    if not files:
        raise InputError(
            f"{name}: expected {source.files} in {source.repository} at {source.revision[:12]}, "
            "got no such file"
        )
    return files


def _unreachable(name: str, error: Exception) -> InputError:
    """Return the error for a corpus that the network does not give."""
    source = SOURCES[name]
    if isinstance(source, Download):
        advice = f"get {source.url} and name the file"
    else:
        advice = (
            f"get {source.files} of huggingface.co/datasets/{source.repository} and name its folder"
        )
    return InputError(
        f"{name}: expected to reach the network, got {type(error).__name__}; connect, or {advice}"
    )


def _file_system() -> Any:
    """Return the file system of huggingface.co."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise InputError(
            "data: expected the package huggingface_hub, found none; pip install 'tritium[data]'"
        ) from None
    return HfFileSystem()


def _list_files(source: Hosted, file_system: Any) -> list[RemoteFile]:
    root = f"datasets/{source.repository}@{source.revision}"
    folder = source.files.rsplit("/", 1)[0]
    found = file_system.ls(f"{root}/{folder}", detail=True)
    return [
        RemoteFile(each["name"], each["size"], file_system)
        for each in sorted(found, key=lambda each: each["name"])
        if fnmatch.fnmatch(each["name"].rsplit("/", 1)[-1], source.files.rsplit("/", 1)[-1])
    ]


def _fetch(name: str, source: Download) -> Path:
    path = cache_dir() / "downloads" / name
    if path.is_file() and _sha256(path.read_bytes()) == source.sha256:
        return path
    try:
        with urllib.request.urlopen(source.url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise _unreachable(name, error) from None
    if _sha256(content) != source.sha256:
        raise InputError(
            f"{source.url}: expected content with SHA-256 {source.sha256[:12]}, got "
            f"{_sha256(content)[:12]}; get the file another way and name it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [content])
    return path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
