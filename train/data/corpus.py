"""A corpus: files, folders and the names `stdlib` and `python`, as a stream of documents.

    .txt .md .py       one document each, UTF-8
    .jsonl .jsonl.gz   one document a line: a JSON object with the text in one field
    .parquet           one document a row: the text in one column (needs pyarrow)
    stdlib             the .py files of the running interpreter's standard library, without tests: about 12 MB on any machine
    python             every .py file of its standard library and of its site-packages

Documents come in the order of the inputs, sorted within each, one at a time: memory holds one file of text or one line of
jsonl. Empty texts and exact repeats are dropped; text files that hold NUL bytes or are not UTF-8 are skipped; repeats and
skipped files are counted. To read a folder called `stdlib`, write `./stdlib`.
"""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")
_TYPES = ", ".join(SUFFIXES)

# Under the standard library these hold tests (lib2to3/tests, idlelib/idle_test) or other people's code.
_NOT_STDLIB = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_NOT_SOURCE = frozenset({"__pycache__"})
_PARQUET_ROWS = 1024


class Document(NamedTuple):
    """text: not empty, no lone surrogates.   source: the file, `:line` added for jsonl.   digest: 16 bytes, blake2b of text."""

    text: str
    source: str
    digest: bytes


class Corpus:
    """The documents of some inputs; `documents()` may be called again and gives the same ones.

    Attributes:
        files: sorted list of Path.   total_bytes: their size on disk.
        bytes_read, duplicates, skipped_files: of the latest `documents()`, so far; for a progress bar and the record.
    """

    def __init__(self, inputs: Sequence[str | Path], *, text_field: str = "text"):
        """Find the files.

        Args:    inputs: files, folders, `stdlib`, `python`.   text_field: JSON key or parquet column.
        Raises:  InputError for a missing input, a file of another type, a folder without text, a jsonl or parquet without need.
        """
        if not inputs:
            raise InputError(
                f"data: expected at least one input (a file, a folder, stdlib or python), got none; types: {_TYPES}"
            )
        self.inputs = [str(given) for given in inputs]
        self.text_field = text_field
        self.files = list(dict.fromkeys(path for given in self.inputs for path in _find(given)))
        self._stats = [path.stat() for path in self.files]
        self.total_bytes = sum(stat.st_size for stat in self._stats)
        self.bytes_read = self.duplicates = self.skipped_files = 0

    def fingerprint(self) -> str:
        """64 hex digits over path, size and modification time in ns of every file, and the text field."""
        digest = hashlib.sha256(json.dumps(self.text_field).encode())
        for path, stat in zip(self.files, self._stats, strict=True):
            digest.update(
                json.dumps([str(path.absolute()), stat.st_size, stat.st_mtime_ns]).encode()
            )
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield every document once.

        Raises:  InputError for a malformed file (with its line), or at the end if there was no text; OSError if unreadable.
        """
        self.bytes_read = self.duplicates = self.skipped_files = 0
        # 16 bytes of hash are enough: among 10**9 documents a chance meeting has probability 10**-21.
        seen: set[bytes] = set()
        for path, stat in zip(self.files, self._stats, strict=True):
            before = self.bytes_read
            for text, source, position in self._texts(path):
                self.bytes_read = before + position
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if digest in seen:
                    self.duplicates += 1
                elif text:
                    seen.add(digest)
                    yield Document(text, source, digest)
            self.bytes_read = before + stat.st_size
        if not seen:
            what = (
                f"{self.skipped_files} of them binary or not UTF-8"
                if self.skipped_files
                else "all of them empty"
            )
            raise InputError(
                f"data: expected text in {' '.join(self.inputs)}, got {len(self.files)} files, {what}; give UTF-8 text"
            )

    def _texts(self, path: Path) -> Iterator[tuple[str, str, int]]:
        """Text, where it is from, and how many bytes of the file are read."""
        if path.suffix in TEXT_SUFFIXES:
            text = _read_text(path)
            if text is None:
                self.skipped_files += 1
            else:
                yield text, str(path), 0
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, self.text_field)
        else:
            yield from _read_jsonl(path, self.text_field)


# --- finding


def _find(given: str) -> list[Path]:
    if given == "stdlib":
        return _walk(_library("stdlib"), (".py",), _NOT_STDLIB, given)
    if given == "python":
        # site-packages lies under the standard library on some systems and elsewhere on others: the union, once each.
        roots = [_library(key) for key in ("stdlib", "purelib", "platlib")]
        found = {
            path
            for root in roots
            if root.is_dir()
            for path in _walk(root, (".py",), _NOT_SOURCE, given, may_be_empty=True)
        }
        if not found:
            raise InputError(
                f"data: python: expected .py files under {roots[0]}, got none; give a folder instead"
            )
        return sorted(found)
    path = Path(given)
    if path.is_dir():
        return _walk(path, SUFFIXES, _NOT_SOURCE, given)
    if not path.exists():
        raise InputError(
            f"data: expected a file, a folder, stdlib or python, got {given!r}, which does not exist; check the path"
        )
    if not path.name.endswith(SUFFIXES):
        raise InputError(
            f"data: expected a file of type {_TYPES}, got {given!r}; convert or rename it"
        )
    return [path]


def _library(key: str) -> Path:
    return Path(sysconfig.get_path(key))


def _walk(
    root: Path,
    suffixes: tuple[str, ...],
    without: frozenset[str],
    given: str,
    may_be_empty: bool = False,
) -> list[Path]:
    """Files below root, sorted; hidden folders (.git, .venv) and `without` are left out, links to folders not followed."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        # A leading dot is a hidden file, or the temporary of one being written; a dangling link is no file.
        paths = [
            Path(folder, name)
            for name in names
            if name.endswith(suffixes) and not name.startswith(".")
        ]
        found += [path for path in paths if path.is_file()]
    if not found and not may_be_empty:
        raise InputError(
            f"data: {given}: expected files of type {', '.join(suffixes)} below {root}, got none; check the folder"
        )
    return sorted(found)


# --- reading


def _read_text(path: Path) -> str | None:
    """The text as it stands (line ends are kept), without a byte order mark; None if it is not UTF-8 text."""
    raw = path.read_bytes()
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[str, str, int]]:
    number = 0
    try:
        with open(path, "rb") as raw:
            for number, line in enumerate(
                gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, 1
            ):
                if line.strip():
                    yield (
                        _parse_line(line, field, f"{path}:{number}"),
                        f"{path}:{number}",
                        raw.tell(),
                    )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: expected gzip data, got damage after line {number} ({error}); get the file again"
        ) from None


def _parse_line(line: bytes, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{place}: expected a JSON object a line, got {line[:60]!r} ({error}); mend the line"
        ) from None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = (
            f"fields {', '.join(map(repr, record))}"
            if isinstance(record, dict)
            else type(record).__name__
        )
        raise InputError(
            f"{place}: expected an object with a string in field {field!r}, got {found}; name the right field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: expected Unicode text, got half a surrogate pair at character {error.start}; mend it"
        ) from None
    return text


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, str, int]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: reading parquet needs pyarrow, which is not installed; pip install pyarrow"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise InputError(
                    f"{path}: expected a column {field!r}, got {', '.join(file.schema_arrow.names)}; name the right one"
                )
            kind = file.schema_arrow.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise InputError(
                    f"{path}: expected strings in column {field!r}, got {kind}; name the right one"
                )
            row, size, rows = 0, path.stat().st_size, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield (
                        text or "",
                        f"{path}:{row}",
                        size * row // rows,
                    )  # a null row is an empty text
    except pyarrow.ArrowInvalid as error:
        raise InputError(
            f"{path}: expected parquet data, got damage ({str(error).splitlines()[0]}); get the file again"
        ) from None
