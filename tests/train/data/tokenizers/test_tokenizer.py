"""All tokenizers: round trips, definition and hash, determinism, each error."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tritium.errors import InputError
from tritium.train.data.tokenizers import tokenizer as module
from tritium.train.data.tokenizers.tokenizer import (
    Tokenizer,
    cut,
    from_spec,
    needs_corpus,
    vocab_size_of,
)
from tritium.train.recipes import RECIPES

pytestmark = pytest.mark.plain

DATA = Path(os.environ.get("TRITIUM_DATA") or Path(__file__).parents[4].parent / "shared" / "data")
GPT2 = DATA / "gpt2.tiktoken"
needs_gpt2 = pytest.mark.skipif(
    not GPT2.exists(), reason=f"needs {GPT2.name} in ../shared/data or $TRITIUM_DATA"
)

SOURCE = Path(module.__file__).read_text(encoding="utf-8")
SAMPLES = [
    "",
    "Hello, world! It's 1234567.\n",
    "    if x:\n\t\treturn [1, 2]\r\n\r\n",
    "Grüße, 世界 🎉 e\u0301 \u2028 \x1c \x00",
    "before <|endoftext|> after",
    " " * 1000 + "x",
]


@pytest.fixture(scope="module")
def learned():
    return from_spec("bpe:512", lambda: [SOURCE])


@pytest.fixture(
    params=["bytes", "chars", "bpe:512", pytest.param("gpt2.tiktoken", marks=needs_gpt2)]
)
def tokenizer(request, learned):
    if request.param == "bpe:512":
        return learned
    spec = str(GPT2) if request.param == "gpt2.tiktoken" else request.param
    return from_spec(spec, lambda: SAMPLES)


def test_decode_inverts_encode(tokenizer):
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids.ndim == 1
        assert ids.dtype == tokenizer.dtype == np.uint16
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
        assert tokenizer.end_of_text not in ids.tolist()
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


@pytest.mark.parametrize("threads", [1, 3])
def test_encode_batch_matches_encode_in_order(tokenizer, threads):
    batch = tokenizer.encode_batch(SAMPLES * 9, threads)
    assert len(batch) == len(SAMPLES) * 9
    for ids, text in zip(batch, SAMPLES * 9, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([], threads) == []


def test_save_and_load_keep_the_definition(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert (loaded.sha256, loaded.name, loaded.kind) == (
        tokenizer.sha256,
        tokenizer.name,
        tokenizer.kind,
    )
    for text in SAMPLES:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert json.loads(path.read_text())["vocab_size"] == tokenizer.vocab_size


def test_different_definitions_have_different_hashes(learned):
    hashes = {
        from_spec("bytes", list).sha256,
        from_spec("chars", lambda: ["ab"]).sha256,
        learned.sha256,
    }
    hashes |= {from_spec("chars", lambda: ["abc"]).sha256}
    assert len(hashes) == 4
    assert (
        from_spec("chars", lambda: ["b", "a"]).sha256 == from_spec("chars", lambda: ["ab"]).sha256
    )


def test_decode_of_partial_characters_and_unknown_ids():
    tokenizer = from_spec("bytes", list)
    assert tokenizer.decode("é".encode()[:1]) == "\ufffd"
    assert tokenizer.decode(np.array([], dtype=np.uint16)) == ""
    for wrong in ([257], [-1]):
        with pytest.raises(InputError, match=rf"\[0, 257\), got {wrong[0]}"):
            tokenizer.decode(wrong)


def test_lone_surrogates_become_replacement_characters(learned):
    for tokenizer in (learned, from_spec("bytes", list)):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_chars_are_sorted_and_unknown_characters_raise():
    tokenizer = from_spec("chars", lambda: ["hello", "abc"])
    assert tokenizer.pieces == [b"a", b"b", b"c", b"e", b"h", b"l", b"o", b"<|endoftext|>"]
    assert tokenizer.encode("lab").tolist() == [5, 0, 1]
    for text, character in (("abé", "é"), ("ab\U0001f389", "\U0001f389"), ("abA", "A")):
        with pytest.raises(InputError, match=f"{character}.*at character 2"):
            tokenizer.encode(text)


def test_large_vocabulary_uses_uint32():
    tokenizer = Tokenizer(
        "chars", "chars", [*(chr(0x20000 + i).encode() for i in range(1 << 16)), b"<|endoftext|>"]
    )
    assert tokenizer.encode("\U0002ffff").dtype == np.uint32
    assert tokenizer.encode("\U0002ffff").tolist() == [0xFFFF]


# --- byte pairs


def test_learned_vocabulary_has_the_requested_size_and_merges_indentation(learned):
    assert learned.vocab_size == 512
    assert len(set(learned.pieces)) == 512
    assert len(learned.encode(SOURCE)) < len(SOURCE.encode()) / 2
    assert len(learned.encode("\n        return")) <= 4


def test_learned_vocabulary_does_not_depend_on_threads_process_or_order(learned):
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from tritium.train.data.tokenizers import tokenizer\n"
        "text = Path(tokenizer.__file__).read_text(encoding='utf-8')\n"
        "print(tokenizer.from_spec('bpe:512', lambda: [text]).sha256)\n"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == learned.sha256
    # Counts of pairs do not depend on the order of documents, so merges do not either.
    half = SOURCE.index("\n\nclass ") + 1
    assert from_spec("bpe:300", lambda: [SOURCE[:half], SOURCE[half:]]).sha256 == (
        from_spec("bpe:300", lambda: [SOURCE[half:], SOURCE[:half]]).sha256
    )


def test_a_million_spaces_are_encoded(learned):
    text = " " * 1_100_000 + "x"
    assert learned.decode(learned.encode(text)) == text


@pytest.mark.parametrize("size", [50, 1000])
def test_cut_parts_have_the_ids_of_the_text(tokenizer, size):
    text = (
        (SOURCE + "\n\n \n!\n?\nx\n\ty\n")
        if tokenizer.kind != "chars"
        else "".join(SAMPLES[1:]) * 9
    )
    parts = list(cut(text, size))
    assert "".join(parts) == text
    assert all(len(part) >= size for part in parts[:-1])
    assert tokenizer.kind == "chars" or len(parts) > 5
    expected = tokenizer.encode(text).tolist()
    assert [i for part in parts for i in tokenizer.encode(part).tolist()] == expected


def test_cut_keeps_text_without_a_safe_place():
    assert list(cut("1 \n2  " * 100, 10)) == ["1 \n2  " * 100]
    assert list(cut("", 10)) == [""]


@needs_gpt2
def test_gpt2_ranks_give_the_published_ids():
    tokenizer = from_spec(str(GPT2), list)
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.name) == (
        50257,
        50256,
        "gpt2.tiktoken",
    )
    assert tokenizer.encode("Hello world, it's  me").tolist() == [
        15496,
        995,
        11,
        340,
        338,
        220,
        502,
    ]


def test_downloaded_gpt2_has_end_of_text_once(monkeypatch):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    special = {"<|endoftext|>": 258}
    published = tiktoken.Encoding(
        "gpt2", pat_str=module.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": published}.__getitem__)
    tokenizer = from_spec("gpt2", list)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (259, 258)
    assert tokenizer.encode("the").tolist() == [257]


# --- errors


def test_needs_corpus_for_learned_vocabularies():
    assert needs_corpus("chars")
    assert needs_corpus("bpe:4096")
    assert not any(needs_corpus(spec) for spec in ("bytes", "gpt2", "x.tiktoken"))


@pytest.mark.parametrize("spec", ["bpe:257", "bpe:999999999", "bpe:", "bpe:4k", "bpe:-300"])
def test_a_wrong_bpe_size_raises(spec):
    with pytest.raises(InputError, match=r"a size from 258 .*try bpe:4096"):
        from_spec(spec, lambda: [SOURCE])


def test_learned_tokens_are_pieces_that_the_encoder_can_find():
    """Texts are split as for encoding, where a number has pieces of two digits."""
    pieces = from_spec("bpe:4096", lambda: ["12345 " * 9]).pieces
    assert b"12" in pieces
    assert not any(piece.isdigit() and len(piece) > 2 for piece in pieces)


def test_a_small_text_gives_a_smaller_vocabulary(capsys):
    tokenizer = from_spec("bpe:4096", lambda: ["the cat sat on the mat"])
    assert 258 <= tokenizer.vocab_size < 300
    line = capsys.readouterr().err
    assert line.startswith("tokenizer bpe:4096: the text gives only ")
    assert line.endswith(f"so the vocabulary has {tokenizer.vocab_size} tokens\n")
    assert tokenizer.decode(tokenizer.encode("the mat").tolist()) == "the mat"
    with pytest.raises(InputError, match=r"gives merges, got none; add text or use bytes"):
        from_spec("bpe:300", lambda: ["a"])


def test_unknown_spec_and_empty_corpus_raise():
    with pytest.raises(InputError, match=r"FILE.json, FOLDER or bpe:SIZE, got 'words'$"):
        from_spec("words", list)
    for wrong, right in (
        ("gtp2", "gpt2"),
        ("GPT2", "gpt2"),
        ("byte", "bytes"),
        ("bpe4096", "bpe:4096"),
    ):
        with pytest.raises(InputError, match=rf"got '{wrong}'; did you mean '{right}'\?$"):
            from_spec(wrong, list)
    with pytest.raises(InputError, match="expected a corpus with characters"):
        from_spec("chars", list)


def test_gpt2_without_network_raises_one_line(monkeypatch):
    import tiktoken

    def fail(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(InputError, match=r"ConnectionError.*use a FILE.tiktoken") as caught:
        from_spec("gpt2", list)
    assert "\n" not in str(caught.value)


def _ranks(pieces):
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


def test_rank_file_gives_its_ids_and_damaged_files_raise(tmp_path):
    path = tmp_path / "own.tiktoken"
    singles = [bytes([i]) for i in range(256)]
    path.write_bytes(_ranks([*singles, b"ab", b"abc"]))
    tokenizer = from_spec(str(path), list)
    assert (tokenizer.vocab_size, tokenizer.name) == (259, "own.tiktoken")
    assert tokenizer.encode("abcab").tolist() == [257, 256]
    for content, message in (
        (
            _ranks(singles) + b"no base64 at all\n",
            r"own.tiktoken:257: expected base64, a space and a rank",
        ),
        (_ranks(singles) + b"YWI= 300\n", "each rank from 0 to 256 once"),
        (_ranks([*singles, b"a"]), "each rank from 0 to 256 once"),
        (_ranks(singles[:-2]), "2 are missing"),
        (b"", "256 are missing"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            from_spec(str(path), list)
    with pytest.raises(FileNotFoundError):
        from_spec(str(tmp_path / "none.tiktoken"), list)


def test_damaged_tokenizer_file_raises(tmp_path, learned):
    path = tmp_path / "tokenizer.json"
    learned.save(path)
    good = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "expected tokenizer version 1, got 2"),
        ({"pieces": good["pieces"][::-1]}, "damaged: expected sha256"),
        ({"kind": "words"}, "damaged: expected sha256"),
        ({"pieces": ["%"]}, r"expected a tokenizer.json"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=message):
            Tokenizer.load(path)
    for content in ("", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"expected a tokenizer.json"):
            Tokenizer.load(path)


def test_a_pipe_raises_and_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: .*expected a file"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_vocab_size_of_matches_the_tokenizer():
    # tinyshakespeare has 65 different characters.
    tinyshakespeare = "".join(map(chr, range(65, 65 + 65)))
    for spec in ("bytes", "chars"):
        assert vocab_size_of(spec) == from_spec(spec, lambda: [tinyshakespeare]).vocab_size
    assert vocab_size_of("bpe:4096") == 4096
    assert all(vocab_size_of(config.tokenizer) > 1 for config in RECIPES.values())


BYTES = [bytes([i]) for i in range(256)]


@pytest.mark.parametrize(
    ("kind", "pieces", "pattern", "message"),
    [
        ("bpe", [*BYTES, b"ab", b"end"], "", "expected a pattern of tritium, got ''"),
        ("bpe", [*BYTES, b"end"], r"((\w+)+)+b", "expected a pattern of tritium"),
        ("bpe", [b"a", b"b", b"end"], module.GPT2_PATTERN, "all 256 bytes among them"),
        ("bpe", [*BYTES, b"a", b"end"], module.GPT2_PATTERN, "expected different pieces"),
        ("bytes", [b"a", b"end"], "", "expected the 256 bytes"),
        ("chars", [b"ab", b"end"], "", "expected a character per piece"),
        ("chars", [b"end"], "", "expected a character per piece"),
        ("chars", [b"\xff", b"end"], "", "invalid start byte"),
    ],
)
def test_a_file_with_impossible_pieces_raises(kind, pieces, pattern, message, tmp_path):
    """Its checksum is correct."""
    definition = {
        "format": "tritium tokenizer",
        "version": 1,
        "kind": kind,
        "name": "x",
        "sha256": module.hash_parts(kind.encode(), pattern.encode(), *pieces),
        "pattern": pattern,
        "pieces": [base64.b64encode(piece).decode() for piece in pieces],
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(definition))
    with pytest.raises(InputError, match=message):
        Tokenizer.load(file)
