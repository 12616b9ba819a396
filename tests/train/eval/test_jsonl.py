import gzip

import pytest

from tritium.errors import InputError
from tritium.train.eval.jsonl import read_jsonl, text_of

pytestmark = pytest.mark.plain


def test_each_object_comes_with_its_file_and_line(tmp_path):
    file = tmp_path / "a.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSON.
    file.write_text('{"a": "\u2028"}\r\n\n{"a": 2}\n', encoding="utf-8")
    assert list(read_jsonl(file)) == [(f"{file}:1", {"a": "\u2028"}), (f"{file}:3", {"a": 2})]


def test_a_gzip_file_raises(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"a": 1}\n'))
    with pytest.raises(InputError, match="expected UTF-8 text, got a gzip file; unpack it"):
        list(read_jsonl(file))


def test_a_text_that_is_missing_or_empty_raises():
    assert text_of({"a": " b "}, "a", "f:1") == " b "
    with pytest.raises(InputError, match=r"f:1: expected the key 'a', got the keys \['b'\]"):
        text_of({"b": "c"}, "a", "f:1")
    for record in ({"a": 1}, {"a": " "}):
        with pytest.raises(InputError, match="f:1: a: expected text, got"):
            text_of(record, "a", "f:1")
