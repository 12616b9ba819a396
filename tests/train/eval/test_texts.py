import numpy as np
import pytest

from tritium.errors import InputError
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.data.shards import write_shard
from tritium.train.data.tokenizers.tokenizer import from_spec
from tritium.train.eval import texts
from tritium.train.eval.perplexity import num_targets
from tritium.train.eval.texts import read_text

pytestmark = pytest.mark.plain
BYTES = from_spec("bytes", list)
END = BYTES.end_of_text


def sequences(text) -> list[list[int]]:
    return [stream.read(0, len(stream)).tolist() for stream in text.sequences]


def test_a_document_begins_with_end_of_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("an é \n b")
    text = read_text(file, BYTES, 257)
    assert sequences(text) == [[END, *"an é \n b".encode()]]
    assert (text.tokens, text.bytes, text.words) == (9, 9, 3)
    assert sequences(read_text(file, BYTES, 257, counting="huggingface"))[0][0] == ord("a")


def test_a_jsonl_file_has_a_document_per_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one two"}\n\n{"text": "three"}\n')
    text = read_text(file, BYTES, 257)
    assert sequences(text) == [[END, *b"one two"], [END, *b"three"]]
    assert (text.tokens, text.bytes, text.words) == (12, 12, 3)


def test_a_dataset_and_its_shard_have_the_same_sizes(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(texts, "_PIECE_TOKENS", 7)  # words are split over pieces
    build(tmp_path / "data", [corpus, __file__], "bytes", progress=False)
    dataset = open_dataset(tmp_path / "data")
    split = read_text(tmp_path / "data", BYTES, 257)
    shard = read_text(tmp_path / "data" / dataset.info.val.shards[0], BYTES, 257)
    for text in (split, shard):
        tokens = dataset.val.read(0, len(dataset.val))
        documents = bytes(np.where(tokens == END, 0, tokens).tolist()).split(b"\0")
        assert text.tokens == len(tokens)
        assert text.bytes == sum(map(len, documents)) == dataset.info.val.bytes
        assert text.words == sum(len(document.decode().split()) for document in documents)
    without = read_text(tmp_path / "data" / dataset.info.val.shards[0], None, 257)
    assert (without.bytes, without.words) == (None, None)


def test_shards_of_llm_c_are_read_with_and_without_a_tokenizer(tmp_path):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 4
    file = tmp_path / "a.bin"
    file.write_bytes(header.tobytes() + np.array([256, *b"a b"], np.uint16).tobytes())
    text = read_text(file, BYTES, 257)
    assert text.sequences[0].read(0, 4).tolist() == [256, *b"a b"]
    assert (text.tokens, text.bytes, text.words) == (4, 3, 2)
    assert read_text(file, None, 257).bytes is None
    with pytest.raises(InputError, match=r"a\.bin: expected tokens below 200"):
        read_text(file, None, 200)

    header[2] = 0
    file.write_bytes(header.tobytes())
    with pytest.raises(InputError, match=r"a\.bin: expected text, got an empty file"):
        num_targets(read_text(file, BYTES, 257), 4, 2)


def test_bad_texts_raise(tmp_path):
    def error(name: str, content: bytes, tokenizer=BYTES, vocab_size=257) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_text(tmp_path / name, tokenizer, vocab_size)
        return str(caught.value)

    assert "a.txt: expected UTF-8 text" in error("a.txt", b"\xff")
    assert "shards instead of" in error("a.txt", b"a", None)
    assert "a.jsonl:2: expected a JSON object" in error("a.jsonl", b'{"text": "a"}\n{"text"')
    missing = "a.jsonl:1: expected the key 'text', got the keys ['t']"
    assert missing in error("a.jsonl", b'{"t": "a"}')
    assert "a.jsonl:1: text: expected text, got 1" in error("a.jsonl", b'{"text": 1}')
    assert "a.jsonl: expected a JSON object per line" in error("a.jsonl", b"\n")
    assert "expected a token shard" in error("a.bin", b"something")
    with pytest.raises(InputError, match="got a folder without"):
        read_text(tmp_path, BYTES, 257)
    file = tmp_path / "b.bin"
    write_shard(file, np.array([1, 2]), 300, "0" * 64)
    with pytest.raises(InputError, match="expected tokens of the model's tokenizer"):
        read_text(file, BYTES, 300)
    with pytest.raises(InputError, match="expected a vocabulary of at most 257 tokens"):
        read_text(file, None, 257)
