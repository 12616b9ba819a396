"""Near duplicates are found at the threshold; the first of similar documents stays."""

import builtins
import random

import numpy as np
import pytest

from tritium.errors import InputError
from tritium.train.data.documents.near_duplicates import (
    NearDuplicates,
    check_similarity,
    rows_per_band,
    signatures,
)
from tritium.train.data.documents.text_batch import TextBatch

pytestmark = pytest.mark.plain
pytest.importorskip("rensa")


def _words(rng, count):
    return [f"w{rng.randrange(20_000)}" for _ in range(count)]


def _find(folder, texts, similarity=0.4):
    near = NearDuplicates(folder, similarity)
    near.add(signatures(TextBatch(texts)))
    found = near.find()
    assert list(folder.iterdir()) == []
    return found.tolist()


def test_similar_documents_repeat_the_first_of_them(tmp_path):
    rng = random.Random(0)
    base = _words(rng, 300)
    edited = base.copy()
    edited[100:110] = _words(rng, 10)
    other = _words(rng, 300)
    texts = [" ".join(words) for words in (other, base, edited, base, base[:60])]
    texts[3] = texts[3].upper().replace(" ", ", ")  # case and punctuation do not count
    assert _find(tmp_path, texts) == [-1, -1, 1, 1, -1]


def test_document_like_a_dropped_one_only_is_kept(tmp_path):
    """C is similar to B and B to A, but C is not similar to A."""
    rng = random.Random(1)
    words = _words(rng, 400)
    texts = [" ".join(words[start : start + 200]) for start in (0, 70, 140)]
    assert _find(tmp_path, texts) == [-1, 0, -1]


def test_texts_without_three_words_are_kept(tmp_path):
    assert _find(tmp_path, ["", "a b", "A B", "a b c", "a b c!"]) == [-1, -1, -1, -1, 3]


def test_signatures_estimate_the_jaccard_index():
    rng = random.Random(2)
    a = _words(rng, 1002)
    b = a[:668] + _words(rng, 334)
    one, two = signatures(TextBatch([" ".join(a), " ".join(b)]))
    # 666 of 1,334 runs of three words are shared. The standard error of 128 hashes is 0.044.
    assert np.mean(one == two) == pytest.approx(666 / 1334, abs=3 * 0.044)


@pytest.mark.parametrize(("agreeing", "found"), [(64, [-1, -1]), (65, [-1, 0])])
def test_hashes_that_agree_by_chance_do_not_count(tmp_path, agreeing, found):
    """The threshold of 0.5 needs 64 equal hashes. About 0.25 of 64 are equal by chance."""
    rows = np.ones((2, 128), np.uint32)
    rows[1, agreeing:] = 2
    near = NearDuplicates(tmp_path, 0.5)
    near.add(rows)
    assert near.find().tolist() == found


def test_rows_per_band_keep_pairs_at_the_threshold():
    for similarity in (0.2, 0.4, 0.6, 0.8, 0.95, 1.0):
        rows = rows_per_band(similarity)
        assert 1 - (1 - similarity**rows) ** (128 // rows) >= 0.9
    assert rows_per_band(0.4) == 3
    assert rows_per_band(1.0) == 8


def test_no_documents(tmp_path):
    assert NearDuplicates(tmp_path, 0.5).find().tolist() == []


@pytest.mark.parametrize("similarity", [-1, 0.1, 1.1, float("nan")])
def test_similarity_out_of_range_raises(similarity):
    with pytest.raises(InputError, match=r"near_duplicates: expected 0 \(off\) or a similarity"):
        check_similarity(similarity)


def test_missing_package_raises(monkeypatch):
    original_import = builtins.__import__

    def import_without(name, *rest):
        if name == "rensa":
            raise ImportError(name)
        return original_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", import_without)
    with pytest.raises(InputError, match="near_duplicates: expected the package rensa"):
        signatures(TextBatch(["a b c"]))
