"""Words, runs of words, and shares of characters, compared with plain Python."""

import re
import string

import numpy as np
import pytest

from tritium.train.data.documents import text_batch as module
from tritium.train.data.documents.text_batch import TextBatch

pytestmark = pytest.mark.plain

TEXTS = ["Hello, world! hello", "", "...", "one two one two one two", "Größe größe", "a-b c" * 50]


def _words(text):
    return re.findall(r"[^\W_]+", text.lower())


def test_words_have_equal_hashes_if_they_are_equal():
    batch = TextBatch(TEXTS)
    expected = [(word, i) for i, text in enumerate(TEXTS) for word in _words(text)]
    assert batch.documents.tolist() == [document for _, document in expected]
    of_word = {}
    for (word, _), value in zip(expected, batch.words.tolist(), strict=True):
        # The case of letters that are not ASCII is kept.
        assert of_word.setdefault(word.replace("ö", "o"), value) == value
    assert len(set(of_word.values())) == len(of_word)


def test_hash_of_a_word_does_not_depend_on_its_place():
    alone = TextBatch(["word"]).words[0]
    assert TextBatch(["x " * 70_000 + "word"]).words[-1] == alone


@pytest.mark.parametrize("size", [1, 2, 5])
def test_repeated_shares_match_a_count(size):
    shares = TextBatch(TEXTS).repeated_shares(size)
    for text, share in zip(TEXTS, shares, strict=True):
        words = _words(text)
        runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        expected = 1 - len(set(runs)) / len(runs) if runs else 0
        assert share == pytest.approx(expected)


def test_symbol_shares_match_a_count():
    for text, share in zip(TEXTS, TextBatch(TEXTS).symbol_shares(), strict=True):
        characters = [c for c in text if not c.isspace()]
        symbols = sum(c in string.punctuation for c in characters)
        assert share == pytest.approx(symbols / max(1, len(characters)))


def test_long_documents_are_cut(monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 10)
    batch = TextBatch(["one two three four", "five"])
    assert batch.texts == ["one two th", "five"]
    assert batch.characters.tolist() == [18, 4]
    assert len(batch.words) == 4


def test_documents_without_words():
    batch = TextBatch(["", "..."])
    assert len(batch.words) == 0
    assert batch.repeated_shares(2).tolist() == [0, 0]
    assert all(len(part) == 0 for part in batch.ngrams(3))
    assert batch.characters.dtype == np.int64
