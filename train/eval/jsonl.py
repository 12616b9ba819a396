"""Read jsonl files: one JSON object per line. Errors name the file and the line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..storage.records import parse_object, shorten

# The first bytes of a gzip file.
_GZIP_MAGIC = b"\x1f\x8b"


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield "FILE:LINE" and the object of each line. Empty lines are skipped.

    Raises: InputError for a line that is not a JSON object, or a file without objects.
    """
    count = 0
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = parse_object(line)
        except ValueError as error:
            reason = getattr(error, "msg", "")  # without the parser's own line number
            got = f"{line[:60]!r} ({reason})" if reason else repr(line[:60])
            raise InputError(f"{place}: expected a JSON object, got {got}") from None
        count += 1
        yield place, record
    if not count:
        raise InputError(f"{path}: expected a JSON object per line, got an empty file")


def read_utf8(path: Path) -> str:
    """Return the text of a file, without a byte order mark.

    Raises: InputError if it is not UTF-8; OSError.
    """
    content = path.read_bytes()
    if content.startswith(_GZIP_MAGIC):
        raise InputError(f"{path}: expected UTF-8 text, got a gzip file; unpack it with gunzip")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error}") from None


def text_of(record: dict[str, Any], key: str, place: str) -> str:
    """Return the text under a key. Raises: InputError if it is missing, empty or no text."""
    if key not in record:
        raise InputError(f"{place}: expected the key {key!r}, got the keys {shorten(list(record))}")
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {key}: expected text, got {shorten(value)}")
    return value
