"""Corpora by name, without a network: a stand-in for huggingface.co is a folder of parquet."""

import io
import urllib.request

import pytest

from tritium.errors import InputError
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.data.documents import sources as module
from tritium.train.data.documents.corpus import Corpus
from tritium.train.data.documents.sources import SOURCES, Download, Hosted, find_source

pytestmark = pytest.mark.plain

ROWS = 3000


class Folder:
    """A file system with the paths of huggingface.co, whose files lie in a folder."""

    def __init__(self, root):
        self.root = root
        self.opened = []

    def ls(self, path, detail):
        files = (self.root / path).iterdir()
        return [{"name": f"{path}/{file.name}", "size": file.stat().st_size} for file in files]

    def open(self, path, mode):
        self.opened.append(path)
        return open(self.root / path, mode)


@pytest.fixture
def hosted(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source = SOURCES["fineweb-edu-10b"]
    folder = tmp_path / "hub" / f"datasets/{source.repository}@{source.revision}" / "sample/10BT"
    folder.mkdir(parents=True)
    for number in range(2):
        texts = [f"Page {number} {i} of a stand-in." for i in range(ROWS)]
        table = pyarrow.table({"text": texts, "id": list(range(ROWS))})
        parquet.write_table(table, folder / f"00{number}_00000.parquet", row_group_size=500)
    (folder / "README.md").write_text("other")
    system = Folder(tmp_path / "hub")
    monkeypatch.setattr(module, "_file_system", lambda: system)
    monkeypatch.chdir(tmp_path)
    return system


def test_hosted_corpus_is_read_in_order(hosted):
    corpus = Corpus(["fineweb-edu-10b"])
    documents = list(corpus.documents())
    assert len(documents) == 2 * ROWS
    assert documents[-1].text == f"Page 1 {ROWS - 1} of a stand-in."
    assert documents[0].source.endswith("/sample/10BT/000_00000.parquet:1")
    assert corpus.bytes_read == corpus.total_bytes > 0
    assert SOURCES["fineweb-edu-10b"].revision in documents[0].source
    assert corpus.fingerprint() == Corpus(["fineweb-edu-10b"]).fingerprint()


def test_build_with_a_given_vocabulary_reads_it_once(hosted, tmp_path):
    """Besides the first documents, which tell how the text is split."""
    build(tmp_path / "out", ["fineweb-edu-10b"], "bytes", progress=False)
    assert open_dataset(tmp_path / "out").info.inputs == ["fineweb-edu-10b"]
    assert sum(path.endswith("001_00000.parquet") for path in hosted.opened) == 1


def test_folder_of_the_same_name_goes_first(hosted, tmp_path):
    (tmp_path / "fineweb-edu-10b").mkdir()
    (tmp_path / "fineweb-edu-10b" / "a.txt").write_text("mine")
    assert [document.text for document in Corpus(["fineweb-edu-10b"]).documents()] == ["mine"]


def test_no_network_raises_and_says_what_to_download(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_file_system", fail)
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    for name, source in SOURCES.items():
        address = source.url if isinstance(source, Download) else source.repository
        with pytest.raises(InputError, match=rf"{name}: expected to reach .*OSError; .*{address}"):
            find_source(name)


def test_network_that_fails_while_reading_raises(hosted, monkeypatch):
    def fail(path, mode):
        raise ConnectionError("reset")

    hosted.open = fail
    with pytest.raises(InputError, match="expected data from the network, got ConnectionError"):
        list(Corpus(["fineweb-edu-10b"]).documents())


def test_no_matching_file_raises(hosted, monkeypatch):
    hosted.ls = lambda path, detail: []
    with pytest.raises(InputError, match=r"expected sample/10BT/\*.parquet in HuggingFaceFW"):
        find_source("fineweb-edu-10b")


def test_download_is_checked_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    content = b"First Citizen"
    calls = []

    def answer(url, timeout):
        calls.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(InputError, match="expected content with SHA-256 86c4e6aa9db7, got"):
        find_source("tinyshakespeare.txt")
    assert not (tmp_path / "downloads").exists()
    good = Download("https://example.org/x", module._sha256(content), size=13)
    monkeypatch.setitem(SOURCES, "tinyshakespeare.txt", good)
    for _ in range(2):
        texts = [document.text for document in Corpus(["tinyshakespeare.txt"]).documents()]
        assert texts == ["First Citizen"]
    assert len(calls) == 2


def test_every_hosted_corpus_is_one_commit():
    for source in SOURCES.values():
        if isinstance(source, Hosted):
            assert len(source.revision) == 40
            assert source.files.endswith(".parquet")
