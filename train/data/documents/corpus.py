"""Read documents from files, folders, and names such as `stdlib`.

    .txt .md .py       one document per file, UTF-8
    .jsonl .jsonl.gz   one document per line: a JSON object with the text in one field
    .json              one document per item of a list: such an object, or a string; or as jsonl
    .csv .tsv          one document per row: the text in one column, by its name in the first row,
                       or by its number in a file without names
    .parquet           one document per row: the text in one column (needs pyarrow)
    stdlib             the .py files of Python's standard library, without its tests and tables of
                       characters: about 11 MB
    python             all .py files of the standard library and of site-packages
    NAME               a corpus from the network, see sources.py

Documents keep the order of the inputs. Files of one input are sorted. A folder is read without its
.json, .csv and .tsv files, which often hold other things than text; name such files themselves.
Memory holds one text file, one json file, one line or one batch of parquet rows at a time. Empty
documents, nulls and exact duplicates are dropped. Text files with NUL bytes or invalid UTF-8 are
skipped. Duplicates and skipped files are counted. Write `./stdlib` to read a folder with the name
`stdlib`.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from ....errors import InputError
from ._readers import READERS, read_text
from .sources import SOURCES, RemoteFile, find_source

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, *READERS)
_FOLDER_SUFFIXES = tuple(each for each in SUFFIXES if each not in (".json", ".csv", ".tsv"))
_SUFFIX_LIST = ", ".join(SUFFIXES)

# Folders inside the standard library that hold its tests (lib2to3/tests, idlelib/idle_test),
# installed packages, or generated tables: models would learn to write tables of character codes.
_NOT_STDLIB = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"encodings", "pydoc_data"}
)
_NOT_SOURCE = frozenset({"__pycache__"})


# Characters counted per text, to limit a batch of very short ones too.
_TEXT_OVERHEAD = 64


class HasText(Protocol):
    text: str


Item = TypeVar("Item", bound=HasText)


def batches_of_text(items: Iterable[Item], characters: int) -> Iterator[list[Item]]:
    """Yield items in batches of about so many characters."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.text) + _TEXT_OVERHEAD
        if size >= characters:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


class Document(NamedTuple):
    """One document.

    Attributes:
        text: not empty, without lone surrogates.
        source: the path of its file. In types other than text, with `:` and the number of its line,
            row or item.
        digest: 16 bytes, the BLAKE2b hash of the text.
        input: the index of its input.
    """

    text: str
    source: str
    digest: bytes
    input: int = 0


class Corpus:
    """The documents of some inputs. Each call of `documents()` gives the same documents.

    Attributes:
        inputs: the inputs as strings.
        files: the paths of all files, in the order in which they are read.
        total_bytes: size of all files on disk.
        bytes_read, duplicates, skipped_files: counts of the latest `documents()` call, up to now.
    """

    def __init__(self, inputs: Sequence[str | Path], *, text_field: str = "text"):
        """Find the files.

        Args:
            inputs: files, folders, `stdlib`, `python`.
            text_field: key or column that holds the text, in all types but text files.
        Raises: InputError if an input does not exist, is a file of an unknown type, or is a folder
            without readable files.
        """
        if not inputs:
            raise InputError(
                "data: expected at least one input (a file, a folder, stdlib or python), got none; "
                f"file types: {_SUFFIX_LIST}"
            )
        self.inputs = [str(given) for given in inputs]
        self.text_field = text_field
        inputs_of: dict[Path | RemoteFile, int] = {}
        for number, given in enumerate(self.inputs):
            for path in _find(given):
                inputs_of.setdefault(path, number)
        self.files = list(inputs_of)
        self._input_of = inputs_of
        self._sizes = [_size(path) for path in self.files]
        self.total_bytes = sum(self._sizes)
        self.bytes_read = 0
        self.duplicates = 0
        self.skipped_files = 0

    def fingerprint(self) -> str:
        """Hash the text field and the path, size and modification time of each file.

        Returns: 64 hex digits.
        """
        return fingerprint(self.files, self.text_field)

    def documents(self) -> Iterator[Document]:
        """Yield each document once.

        Raises: InputError for a malformed file (with its line), or at the end if all documents were
            empty; OSError if a file cannot be read.
        """
        self.bytes_read = self.duplicates = self.skipped_files = 0
        # Among 10**9 documents, two have the same 16-byte hash with probability 10**-21.
        seen: set[bytes] = set()
        for path, size in zip(self.files, self._sizes, strict=True):
            before = self.bytes_read
            for text, source, position in self._texts(path):
                self.bytes_read = before + position
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if digest in seen:
                    self.duplicates += 1
                elif text:
                    seen.add(digest)
                    yield Document(text, source, digest, self._input_of[path])
            self.bytes_read = before + size
        if not seen:
            reason = "binary or not UTF-8" if self.skipped_files else "empty"
            count = len(self.files)
            some = f"{count} files, {self.skipped_files or 'all'} of them {reason}"
            found = f"1 file, which is {reason}" if count == 1 else some
            raise InputError(
                f"data: expected text in {' '.join(self.inputs)}, got {found}; give UTF-8 text"
            )

    def _texts(self, path: Path | RemoteFile) -> Iterator[tuple[str, str, int]]:
        """Yield (text, source, bytes of the file read so far) for each document of one file."""
        if path.suffix in TEXT_SUFFIXES:
            text = read_text(path)
            if text is None:
                self.skipped_files += 1
            else:
                yield text, str(path), 0
        else:
            suffix = next(each for each in READERS if path.name.endswith(each))
            yield from READERS[suffix](path, self.text_field)


def fingerprint(paths: Sequence[Path | RemoteFile], text_field: str) -> str:
    """Hash the text field and the path, size and modification time of each file.

    The path of a remote file has its revision.
    """
    digest = hashlib.sha256(json.dumps(text_field).encode())
    for path in paths:
        if isinstance(path, RemoteFile):
            identity = [str(path), path.size]
        else:
            identity = [str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns]
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()


def _size(path: Path | RemoteFile) -> int:
    return path.size if isinstance(path, RemoteFile) else path.stat().st_size


# --- find files


def _find(given: str) -> Sequence[Path | RemoteFile]:
    if not given:
        raise InputError(
            "data: expected files, folders, stdlib or python, got an empty name; "
            "write . for the current folder"
        )
    if given == "stdlib":
        return _walk(_library("stdlib"), (".py",), _NOT_STDLIB, given)
    if given == "python":
        return _find_python()
    path = Path(given)
    if given in SOURCES and not path.exists():
        return find_source(given)
    if path.is_dir():
        return _walk(path, _FOLDER_SUFFIXES, _NOT_SOURCE, given)
    if not path.exists():
        raise InputError(
            f"data: expected a file, a folder, stdlib, python or a name ({', '.join(SOURCES)}), "
            f"got {given!r}, which does not exist; check the path"
        )
    if not path.name.endswith(SUFFIXES):
        raise InputError(
            f"data: expected a file of type {_SUFFIX_LIST}, got {given!r}; convert or rename it"
        )
    return [path]


def _find_python() -> list[Path]:
    """All .py files of the standard library and of site-packages.

    On some systems site-packages is inside the standard library's folder, so paths may repeat.
    """
    roots = [_library(key) for key in ("stdlib", "purelib", "platlib")]
    found: set[Path] = set()
    for root in roots:
        if root.is_dir():
            found.update(_walk(root, (".py",), _NOT_SOURCE, "python", may_be_empty=True))
    if not found:
        raise InputError(
            f"data: python: expected .py files under {roots[0]}, got none; give a folder instead"
        )
    return sorted(found)


def _library(key: str) -> Path:
    return Path(sysconfig.get_path(key))


def _walk(
    root: Path,
    suffixes: tuple[str, ...],
    excluded: frozenset[str],
    given: str,
    may_be_empty: bool = False,
) -> list[Path]:
    """List the files below `root`, sorted, without hidden files and folders and `excluded` folders.

    Links to folders are not followed.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        # A leading dot marks a hidden file, or the temporary file of a write in progress.
        paths = [
            Path(folder, name)
            for name in names
            if name.endswith(suffixes) and not name.startswith(".")
        ]
        found += [path for path in paths if path.is_file()]  # not a dangling link
    if not found and not may_be_empty and (root / "dataset.json").is_file():
        raise InputError(f"data: {given}: expected a dataset alone, got it with other inputs")
    if not found and not may_be_empty:
        raise InputError(
            f"data: {given}: expected files of type {', '.join(suffixes)} below {root}, got none; "
            "check the folder, or name .json, .csv and .tsv files themselves"
        )
    return sorted(found)
