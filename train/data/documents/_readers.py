"""Read the documents of one file. corpus.py lists the types.

Each reader yields (text, source, bytes of the file read so far). A source names the file and the
line, row or item, for messages.
"""

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ....errors import InputError
from ...storage.records import csv_rows
from .sources import RemoteFile

if TYPE_CHECKING:
    import pyarrow

_PARQUET_ROWS = 1024

Texts = Iterator[tuple[str, str, int]]


def read_text(path: Path) -> str | None:
    """Return the text without its byte order mark; None if it has NUL bytes or is not UTF-8."""
    raw = path.read_bytes()
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _read_jsonl(path: Path, field: str) -> Texts:
    number = 0
    try:
        with open(path, "rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            for number, line in enumerate(lines, 1):
                if line.strip():
                    source = f"{path}:{number}"
                    yield _parse_line(line, field, source), source, raw.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: expected gzip data, got damage after line {number} ({error}); "
            "get the file again"
        ) from None


def _parse_line(line: bytes, field: str, source: str) -> str:
    try:
        record = json.loads(line)
    except RecursionError:
        raise InputError(
            f"{source}: expected one JSON object per line, got brackets nested too deeply; "
            "correct the line"
        ) from None
    except ValueError as error:
        raise InputError(
            f"{source}: expected one JSON object per line, got {line[:60]!r} ({error}); "
            "correct the line"
        ) from None
    return _text_of(record, field, source)


def _text_of(record: object, field: str, source: str) -> str:
    """Return the text in one field of a JSON object. A null becomes an empty text."""
    has_field = isinstance(record, dict) and field in record
    text = record[field] if has_field else None
    if has_field and text is None:
        return ""
    if not isinstance(text, str):
        found = (
            f"fields {', '.join(map(repr, record))}"
            if isinstance(record, dict)
            else type(record).__name__
        )
        raise InputError(
            f"{source}: expected an object with a string in field {field!r}, got {found}; "
            "set another `text_field`"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: expected Unicode text, got half of a surrogate pair at character "
            f"{error.start}; correct the line"
        ) from None
    return text


def _read_json(path: Path, field: str) -> Texts:
    """A list of objects or strings, or one object; otherwise one object per line."""
    records = _parse_json(path)
    if records is None:
        yield from _read_jsonl(path, field)
        return
    for number, record in enumerate(records, 1):
        source = f"{path}:{number}"
        yield (
            _text_of({field: record} if isinstance(record, str) else record, field, source),
            source,
            0,
        )


def _parse_json(path: Path) -> list | None:
    """Read a file completely and return its items. None: there is more after the first value."""
    try:
        records = json.loads(path.read_bytes())
    except RecursionError:
        raise InputError(
            f"{path}: expected JSON, got brackets nested too deeply; correct the file"
        ) from None
    except ValueError as error:
        if getattr(error, "msg", None) == "Extra data":
            return None
        raise InputError(f"{path}: expected JSON ({error}); correct the file") from None
    return records if isinstance(records, list) else [records]


def _read_csv(path: Path, field: str) -> Texts:
    """Rows of a csv or tsv file. A number as field is the number of a column without a name."""
    number = 0
    try:
        with open(path, "rb") as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            rows = csv_rows(text, path)
            column = _column(path, rows, field)
            for row in rows:
                number = rows.line_num
                if not row:
                    continue
                if column >= len(row):
                    raise InputError(
                        f"{path}:{number}: expected column {column + 1} with the text, got a row "
                        f"of {len(row)} columns; correct the line"
                    )
                yield row[column], f"{path}:{number}", raw.tell()
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: expected {path.suffix[1:]} in UTF-8, got damage after line {number} "
            f"({error}); correct the file"
        ) from None


def _column(path: Path, rows: Iterator[list[str]], field: str) -> int:
    """Return the index of the column with a number from 1, or with a name in the first row."""
    if field.isdecimal() and int(field) >= 1:
        return int(field) - 1
    names = next(rows, [])
    if field not in names:
        raise InputError(
            f"{path}:1: expected a column {field!r}, got {', '.join(names)[:100]}; give another "
            "text field: the name of a column, or its number from 1 if the file has no names"
        )
    return names.index(field)


def _read_parquet(path: Path | RemoteFile, field: str) -> Texts:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: reading parquet needs pyarrow, which is not installed; pip install pyarrow"
        ) from None
    try:
        with _opened(path) as content, pyarrow.parquet.ParquetFile(content) as file:
            _check_column(path, file.schema_arrow, field)
            row = 0
            rows = file.metadata.num_rows
            file_bytes = path.size if isinstance(path, RemoteFile) else path.stat().st_size
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for text in _strings(path, batch.column(field), row):
                    row += 1
                    position = file_bytes * row // rows
                    yield text or "", f"{path}:{row}", position  # a null becomes an empty text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        # An OSError of the operating system has an errno. pyarrow's OSError for damage has none.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: expected parquet data that pyarrow can read, got an error ({reason}); get "
            "the file again, or write it with another program"
        ) from None


def _strings(path: Path | RemoteFile, column: "pyarrow.Array", row: int) -> list[str | None]:
    """Return the strings of a column whose first row is `row` + 1.

    Raises: InputError, which names the row, for bytes that are not UTF-8. pyarrow does not check
        them when it writes a file.
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(column, row + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: expected UTF-8 text, got {error}; correct the row"
                ) from None
        raise


@contextlib.contextmanager
def _opened(path: Path | RemoteFile) -> Iterator[BinaryIO]:
    """Open a file. Raises: InputError if the network fails while a remote file is read."""
    if isinstance(path, Path):
        with open(path, "rb") as file:
            yield file
        return
    try:
        with path.open() as file:
            yield file
    # pyarrow passes on the exceptions of the network library.
    except Exception as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: expected data from the network, got {type(error).__name__}; start again, or "
            "download the files and name their folder"
        ) from None


def _check_column(path: Path | RemoteFile, schema: "pyarrow.Schema", field: str) -> None:
    import pyarrow

    if schema.names.count(field) != 1:
        raise InputError(
            f"{path}: expected one column {field!r}, got {', '.join(schema.names)}; "
            "set another `text_field`"
        )
    dtype = schema.field(field).type
    values = dtype.value_type if pyarrow.types.is_dictionary(dtype) else dtype
    if str(values) not in ("string", "large_string", "string_view"):
        raise InputError(
            f"{path}: expected strings in column {field!r}, got {dtype}; set another `text_field`"
        )


# Suffix of a file -> reader of its records.
READERS: dict[str, Callable[[Path, str], Texts]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
