"""Documents from every file type, in order, without duplicates; each bad input."""

import builtins
import errno
import gzip
import io
import json
import os
import sys

import pytest

from tritium.errors import InputError
from tritium.train.data.documents import _readers
from tritium.train.data.documents.corpus import Corpus, Document, batches_of_text

pytestmark = pytest.mark.plain


def _texts(corpus):
    return [document.text for document in corpus.documents()]


def _mixed(folder):
    (folder / "sub").mkdir()
    (folder / "b.txt").write_bytes("Grüße\r\n".encode())
    (folder / "a.md").write_text("# title")
    (folder / "sub" / "c.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    (folder / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n{"text": ""}\n')
    with gzip.open(folder / "e.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n{"text": "one"}\n')
    (folder / "f.txt").write_text("# title")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"ELF\0\1\2")
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "image.png").write_bytes(b"png")
    (folder / ".git").mkdir()
    (folder / ".git" / "g.txt").write_text("hidden")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "h.py").write_text("cache")
    return folder


def test_folder_gives_documents_of_all_types_without_duplicates(tmp_path):
    corpus = Corpus([_mixed(tmp_path)])
    documents = list(corpus.documents())
    assert [document.text for document in documents] == [
        "# title",
        "Grüße\r\n",
        "one",
        "two",
        "three",
        "x = 1\n",
    ]
    assert documents[3].source == f"{tmp_path / 'd.jsonl'}:3"
    assert (corpus.duplicates, corpus.skipped_files) == (2, 2)
    assert (
        corpus.bytes_read == corpus.total_bytes == sum(path.stat().st_size for path in corpus.files)
    )
    # A second pass starts its counts at 0 and gives the same documents.
    assert list(corpus.documents()) == documents
    assert (corpus.duplicates, corpus.skipped_files) == (2, 2)


def test_file_given_twice_is_read_once_as_part_of_the_first_input(tmp_path):
    _mixed(tmp_path)
    corpus = Corpus([tmp_path / "f.txt", tmp_path])
    assert len(corpus.files) == len(set(corpus.files))
    documents = list(corpus.documents())
    assert documents[0].text == "# title"
    assert [document.input for document in documents] == [0, *[1] * (len(documents) - 1)]
    assert corpus.duplicates == 2


def test_text_field_names_the_json_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "hello"}\n')
    assert _texts(Corpus([tmp_path], text_field="body")) == ["hello"]
    with pytest.raises(
        InputError,
        match=r"a.jsonl:1: expected an object with a string in field 'text', got fields 'body'; "
        "set another `text_field`",
    ):
        _texts(Corpus([tmp_path]))


def test_batches_have_about_the_requested_characters():
    """Each text counts as 64 characters more than it has."""
    documents = [Document("a" * 36, f"{number}.txt", b"", 0) for number in range(7)]
    batches = list(batches_of_text(documents, 300))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert [document for batch in batches for document in batch] == documents


def test_documents_are_read_one_at_a_time(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    documents = Corpus([tmp_path]).documents()
    assert next(documents).text == "fine"
    with pytest.raises(InputError, match=r"a.jsonl:2"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "content", "field", "texts"),
    [
        ("a.json", '[{"text": "one"}, "two", {"text": "", "id": 1}]', "text", ["one", "two"]),
        ("a.json", '{"body": "one"}', "body", ["one"]),
        ("a.json", '{"text": "one"}\n\n{"text": "two"}\n', "text", ["one", "two"]),
        ("a.csv", 'id,text\n1,"a, ""b""\nc"\n\n2,d\n', "text", ['a, "b"\nc', "d"]),
        ("a.tsv", 'ham\tsay "hi\nspam\tbuy\n', "2", ['say "hi', "buy"]),
        ("a.csv", f"text\n{'x' * 200_000}\n", "text", ["x" * 200_000]),
    ],
)
def test_json_csv_and_tsv_give_documents(tmp_path, name, content, field, texts):
    (tmp_path / name).write_text(content)
    assert _texts(Corpus([tmp_path / name], text_field=field)) == texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": null}\n{"text": "one"}\n{"text": null}\n{"text": "one"}\n'),
        ("a.json", '[{"text": null}, {"text": "one"}, {"text": null}, "one"]'),
        ("a.csv", 'id,text\n1,\n2,one\n3,""\n4,one\n'),
    ],
)
def test_nulls_are_dropped_and_are_not_duplicates(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    corpus = Corpus([tmp_path / name])
    assert _texts(corpus) == ["one"]
    assert corpus.duplicates == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1", r"a.json: expected JSON \(Expecting ',' .*\); correct the file"),
        ("a.json", '{"text": "one"}\n{"id": 3}', r"a.json:2: .*string in field 'text', got"),
        ("a.json", "[null]", r"a.json:1: .*string in field 'text', got NoneType"),
        ("a.json", "[" * 100_000, r"a.json: .*brackets nested too deeply"),
        ("a.json", '["one", {"id": 3}]', r"a.json:2: .*string in field 'text', got fields 'id'"),
        ("a.csv", "id,body\n1,2\n", r"a.csv:1: expected a column 'text', got id, body"),
        ("a.csv", "id,text\n1\n", r"a.csv:2: expected column 2 .*got a row of 1 columns"),
        ("a.csv", 'text\n"a"b\n', r"a.csv: expected csv in UTF-8, got damage after line"),
        ("a.tsv", b"text\n\xff\n", r"a.tsv: expected tsv in UTF-8, got damage"),
    ],
)
def test_malformed_json_and_csv_raise(tmp_path, name, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        _texts(Corpus([tmp_path / name]))


@pytest.mark.parametrize("field", ["0", "²"])
def test_columns_are_numbered_from_1(field, tmp_path):
    (tmp_path / "a.csv").write_text("one,two\n")
    with pytest.raises(InputError, match=f"a.csv:1: expected a column '{field}', got one, two"):
        _texts(Corpus([tmp_path / "a.csv"], text_field=field))


def test_folder_is_read_without_json_and_csv(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "table.csv").write_text("1,2")
    assert _texts(Corpus([tmp_path])) == ["text"]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_bytes_read_grows_within_a_file(tmp_path, suffix):
    lines = "".join(
        json.dumps({"text": os.urandom(500).hex()}) + "\n" for _ in range(2000)
    ).encode()
    (tmp_path / f"a.{suffix}").write_bytes(
        gzip.compress(lines, 1) if suffix.endswith("gz") else lines
    )
    corpus = Corpus([tmp_path])
    seen = [corpus.bytes_read for _ in corpus.documents()]
    assert seen == sorted(seen)
    assert seen[1000] == pytest.approx(corpus.total_bytes / 2, rel=0.2)
    assert seen[-1] <= corpus.bytes_read == corpus.total_bytes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected one JSON object per line"),
        ("[1]", "got list"),
        pytest.param("[" * 100_000, "brackets nested too deeply", id="brackets"),
        ('{"text": 3}', "string in field 'text'"),
        ('{"text": "\\ud800"}', "half of a surrogate pair at character 0"),
        (b'{"text": "\xff"}', "expected one JSON object per line"),
    ],
)
def test_malformed_jsonl_line_raises_and_is_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(InputError, match=f"a.jsonl:2: .*{message}") as caught:
        _texts(Corpus([tmp_path]))
    assert "\n" not in str(caught.value)


def test_damaged_gzip_raises(tmp_path):
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode() + b"\n")
    for content in (b"not gzip", whole[:-9], whole[:20] + b"\xff" * 20):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"a.jsonl.gz: expected gzip data"):
            _texts(Corpus([tmp_path]))


def test_parquet_documents_and_wrong_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["eins", None, "zwei", "eins"], "id": [1, 2, 3, 4]}), path
    )
    corpus = Corpus([path])
    assert _texts(corpus) == ["eins", "zwei"]
    assert corpus.duplicates == 1
    with pytest.raises(InputError, match="expected one column 'body', got text, id"):
        _texts(Corpus([path], text_field="body"))
    with pytest.raises(InputError, match="expected strings in column 'id', got int64"):
        _texts(Corpus([path], text_field="id"))
    columns = {"a": [{"text": "in a struct"}], "a.text": ["in a column"]}
    parquet.write_table(pyarrow.table(columns), path)
    assert _texts(Corpus([path], text_field="a.text")) == ["in a column"]


def test_damaged_parquet_is_one_line_with_the_name_of_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["eins", "zwei"]}), path)
    content = path.read_bytes()
    wrong_type, not_utf8 = bytearray(content), bytearray(content)
    wrong_type[5] = 0x0F
    not_utf8[content.index(b"text")] = 0xFF  # the name of the column
    for damaged in (b"no parquet at all", wrong_type, not_utf8):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet: expected parquet data that pyarrow"):
            _texts(Corpus([path]))


def test_errors_of_the_system_while_parquet_is_read_stay(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")

    class BrokenDisk(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "I/O error")

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" * 100)
    monkeypatch.setattr(_readers, "_opened", lambda path: BrokenDisk(path.read_bytes()))
    with pytest.raises(OSError, match="I/O error") as error:
        _texts(Corpus([path]))
    assert error.value.errno == errno.EIO


def test_parquet_strings_of_all_types_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    plain = pyarrow.array(["eins", None, "zwei", "eins"])
    columns = [plain, plain.cast("large_string"), plain.dictionary_encode()]
    if hasattr(pyarrow, "string_view"):
        columns.append(plain.cast("string_view"))
    for column in columns:
        parquet.write_table(pyarrow.table({"text": column}), path)
        assert parquet.read_schema(path).field("text").type == column.type
        assert _texts(Corpus([path])) == ["eins", "zwei"]
    binary = pyarrow.array([b"eins", b"eins"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": binary}), path)
    with pytest.raises(InputError, match="expected strings in column 'text', got dictionary"):
        _texts(Corpus([path]))


def test_parquet_with_bytes_that_are_not_utf8_or_with_two_columns_raises(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    binary = pyarrow.array([b"one"] * 1500 + [b"bad \xff"])
    strings = pyarrow.Array.from_buffers(pyarrow.string(), len(binary), binary.buffers())
    parquet.write_table(pyarrow.table({"text": strings}), path)
    with pytest.raises(
        InputError, match=r"a\.parquet:1501: expected UTF-8 text, got 'utf-8' codec"
    ):
        list(Corpus([path]).documents())

    column = pyarrow.array(["one"])
    parquet.write_table(pyarrow.table([column, column], names=["text", "text"]), path)
    with pytest.raises(InputError, match="expected one column 'text', got text, text"):
        list(Corpus([path]).documents())


def test_parquet_without_pyarrow_raises(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    original_import = builtins.__import__

    def import_without_pyarrow(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", import_without_pyarrow)
    with pytest.raises(InputError, match="pip install pyarrow"):
        _texts(Corpus([tmp_path]))


def test_bad_inputs_raise(tmp_path):
    with pytest.raises(InputError, match="at least one input"):
        Corpus([])
    with pytest.raises(InputError, match=r"none.txt', which does not exist"):
        Corpus([tmp_path / "none.txt"])
    with pytest.raises(InputError, match=r"below .*, got none"):
        Corpus([tmp_path])
    (tmp_path / "a.doc").write_text("a,b")
    with pytest.raises(InputError, match=r"expected a file of type .txt, .*a.doc"):
        Corpus([tmp_path / "a.doc"])
    with pytest.raises(InputError, match=r"got an empty name; write \. for the current folder"):
        Corpus([""])
    (tmp_path / "a.txt").write_bytes(b"\0")
    (tmp_path / "b.md").write_bytes(b"\xff")
    with pytest.raises(InputError, match="got 2 files, 2 of them binary or not UTF-8"):
        _texts(Corpus([tmp_path]))
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.md").write_bytes(b"")
    with pytest.raises(InputError, match="got 2 files, all of them empty"):
        _texts(Corpus([tmp_path]))
    with pytest.raises(InputError, match="got 1 file, which is empty; give UTF-8 text"):
        _texts(Corpus([tmp_path / "a.txt"]))
    (tmp_path / "a.txt").write_bytes(b"\0")
    with pytest.raises(InputError, match="got 1 file, which is binary or not UTF-8; give"):
        _texts(Corpus([tmp_path / "a.txt"]))


def test_fingerprint_changes_with_files_and_text_field(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    first = Corpus([tmp_path]).fingerprint()
    assert Corpus([tmp_path]).fingerprint() == first
    assert Corpus([path]).fingerprint() == first
    assert Corpus([path], text_field="body").fingerprint() != first
    os.utime(path, ns=(1, 1))
    second = Corpus([tmp_path]).fingerprint()
    assert second != first
    (tmp_path / "b.txt").write_text("more")
    assert Corpus([tmp_path]).fingerprint() not in (first, second)


def test_stdlib_has_no_tests_and_no_packages():
    corpus = Corpus(["stdlib"])
    names = {path.name for path in corpus.files}
    assert {"argparse.py", "typing.py"} <= names
    assert corpus.files == sorted(corpus.files)
    assert 5e6 < corpus.total_bytes < 30e6
    assert not any(
        {"test", "tests", "site-packages", "encodings", "pydoc_data"} & set(path.parts[-4:])
        for path in corpus.files
    )


def test_python_is_the_standard_library_and_site_packages():
    corpus = Corpus(["python"])
    assert set(Corpus(["stdlib"]).files) < set(corpus.files)
    assert any(path.parts[-2:] == ("numpy", "__init__.py") for path in corpus.files)


@pytest.mark.skipif(sys.platform == "win32", reason="links need extra rights on Windows")
def test_dangling_links_are_ignored(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "b.txt").write_text("here")
    assert _texts(Corpus([tmp_path])) == ["here"]
