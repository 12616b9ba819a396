"""Filters, near duplicates and weights together: what stays, the report, any number of threads."""

import json
import os
import random
import re
from pathlib import Path

import pytest

from tritium.errors import InputError
from tritium.train.data.documents import selection as module
from tritium.train.data.documents.corpus import Corpus
from tritium.train.data.documents.selection import Selection, SelectionOptions

pytestmark = pytest.mark.plain

DATA = Path(os.environ.get("TRITIUM_DATA") or Path(__file__).parents[4].parent / "shared" / "data")


def _jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _sentences(seed, count, words=30):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(5000)}" for _ in range(words)) for _ in range(count)]


@pytest.fixture
def mixed(tmp_path):
    """20 good documents, then a short one, a repetitive one, a near duplicate and a good one."""
    good = _sentences(0, 21)
    edited = good[3].replace(" ", "! ", 4) + " more"
    bad = ["short", "buy it now and pay less today " * 9, edited]
    return _jsonl(tmp_path / "a.jsonl", [*good[:20], *bad, good[20]]), good


def test_each_stage_drops_and_reports(mixed, tmp_path):
    pytest.importorskip("rensa")
    path, good = mixed
    options = SelectionOptions(filters={"length": 20, "repetition": 0.3}, near_duplicates=0.4)
    chosen = Selection(Corpus([path]), options, tmp_path)
    for _ in range(2):
        assert [document.text for document in chosen.documents()] == good
    assert [(each.reason, each.documents) for each in chosen.dropped] == [
        ("length", 1),
        ("repetition", 1),
        ("near duplicates", 1),
    ]
    assert chosen.dropped[0].examples == [{"source": f"{path}:21", "value": "5", "text": "short"}]
    assert chosen.dropped[2].examples[0]["value"] == f"repeats {path}:4"


def test_filters_alone_need_one_pass(mixed, tmp_path):
    path, good = mixed
    corpus = Corpus([path])
    passes = []

    def source():
        passes.append(1)
        return corpus.documents()

    chosen = Selection(corpus, SelectionOptions(filters={"length": 20}), tmp_path)
    assert len(list(chosen.documents(source))) == len(good) + 2
    assert passes == [1]
    assert chosen.dropped[0].documents == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_and_threads_do_not_change_the_result(mixed, tmp_path, monkeypatch, threads):
    pytest.importorskip("rensa")
    path, good = mixed
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 300)
    options = SelectionOptions(filters={"length": 20, "repetition": 0.3}, near_duplicates=0.4)
    chosen = Selection(Corpus([path]), options, tmp_path, threads)
    assert [document.text for document in chosen.documents()] == good


def test_weights_are_proportions_of_characters(tmp_path):
    paths = [_jsonl(tmp_path / f"{i}.jsonl", _sentences(i, 60 + 60 * i)) for i in range(3)]
    options = SelectionOptions(weights=(2, 1, 0))
    chosen = Selection(Corpus(paths), options, tmp_path)
    texts = [[], [], []]
    for document in chosen.documents():
        texts[document.input].append(document.text)
    sizes = [sum(map(len, each)) for each in texts]
    assert len(texts[0]) == 60  # the scarcest input is complete
    assert sizes[1] == pytest.approx(sizes[0] / 2, abs=200)
    assert sizes[2] == 0
    # The kept documents are spread over the input.
    positions = [_sentences(1, 120).index(text) for text in texts[1]]
    assert sum(position < 60 for position in positions) == pytest.approx(15, abs=1)
    assert chosen.dropped[-1].documents == 60 + 60 * 2 + 60 * 3 - len(texts[0]) - len(texts[1])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1,), "weights: expected one number for each of the 2 inputs, got 1"),
        ((1, -1), "weights: expected numbers of 0 or more, finite, and one above 0, got 1 -1"),
        ((0, 0), "one above 0, got 0 0"),
        ((1, float("nan")), "one above 0, got 1 nan"),
    ],
)
def test_bad_weights_raise(tmp_path, weights, message):
    paths = [_jsonl(tmp_path / f"{i}.jsonl", ["text"]) for i in range(2)]
    with pytest.raises(InputError, match=message):
        Selection(Corpus(paths), SelectionOptions(weights=weights), tmp_path)


def test_nothing_left_raises(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", ["one", "two"])
    for options, message in (
        (SelectionOptions(filters={"length": 9}), "pass the filters, got none of 2"),
        (
            SelectionOptions(filters={"length": 9}, weights=(1,)),
            "weights: expected text in .*a.jsonl, which has weight 1, got none",
        ),
    ):
        with pytest.raises(InputError, match=message):
            list(Selection(Corpus([path]), options, tmp_path).documents())


def test_changed_files_raise(mixed, tmp_path):
    path, good = mixed
    chosen = Selection(Corpus([path]), SelectionOptions(filters={"length": 9}), tmp_path)
    list(chosen.documents())
    for texts in (good[:5], _sentences(1, 30)):
        _jsonl(path, texts)
        with pytest.raises(InputError, match="the files changed while they were read"):
            list(chosen.documents())


def _edit(text, rng, vocabulary):
    """Change each word with probability 0.1."""
    words = re.split(r"(\s+)", text)
    for i in range(0, len(words), 2):
        if rng.random() < 0.1:
            words[i] = rng.choice(vocabulary)
    return "".join(words)


def test_planted_duplicates_in_speeches_are_found(tmp_path):
    """100 copies and 100 documents with 10 % of their words changed, among 233 speeches."""
    pytest.importorskip("rensa")
    source = DATA / "sotu.jsonl"
    if not source.exists():
        pytest.skip(f"needs {source.name} in ../shared/data or $TRITIUM_DATA")
    # The first 3,000 characters of a speech are enough, and faster.
    speeches = [json.loads(line)["text"][:3000] for line in source.read_text().splitlines()]
    rng = random.Random(0)
    vocabulary = sorted({word for speech in speeches for word in speech.split()})
    copies = rng.sample(speeches, 100)
    edited = [_edit(speech, rng, vocabulary) for speech in rng.sample(speeches, 100)]
    path = _jsonl(tmp_path / "planted.jsonl", speeches + copies + edited)

    results = []
    for threads in (1, 3, 1):
        corpus = Corpus([path])
        options = SelectionOptions(near_duplicates=0.4)
        chosen = Selection(corpus, options, tmp_path, threads)
        results.append([document.text for document in chosen.documents()])
        assert corpus.duplicates == 100  # exact
    assert results[0] == results[1] == results[2]
    kept = set(results[0])
    assert sum(text not in kept for text in edited) >= 95
    assert all(speech in kept for speech in speeches)


def test_documents_are_decided_once(tmp_path):
    corpus = Corpus([_jsonl(tmp_path / "a.jsonl", ["one", "two"])])
    chosen = Selection(corpus, SelectionOptions(weights=(1,)), tmp_path)
    passes = []

    def source():
        passes.append("pass")
        return corpus.documents()

    chosen.decide(source)
    assert [document.text for document in chosen.documents(source)] == ["one", "two"]
    assert len(passes) == 2


def test_equal_weights_keep_documents_spread_over_the_larger_input(tmp_path):
    texts = [f"{number:0100}" for number in range(4)]
    paths = [_jsonl(tmp_path / "a.jsonl", texts[:1]), _jsonl(tmp_path / "b.jsonl", texts[1:])]
    chosen = Selection(Corpus(paths), SelectionOptions(weights=(1, 1)), tmp_path)
    assert [document.text for document in chosen.documents()] == [texts[0], texts[2]]
