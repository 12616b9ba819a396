"""Labelled texts: each type of file, each bad line, copies, balance, and the split."""

import collections
import json

import pytest

from tritium.errors import InputError
from tritium.train.finetune.classify_records import (
    LabelledText,
    Parts,
    balanced,
    class_weights,
    read_labelled_texts,
    split_texts,
    without_copies,
)

pytestmark = pytest.mark.plain


def texts_of(*pairs: tuple[str, str]) -> list[LabelledText]:
    return [
        LabelledText(text=text, label=label, place=f"f:{number}")
        for number, (label, text) in enumerate(pairs, 1)
    ]


def split(texts: list[LabelledText], seed: int) -> Parts:
    return split_texts(texts, val_fraction=0.1, test_fraction=0.2, seed=seed)


def pairs_of(texts) -> list[tuple[str, str]]:
    return [(each.label, each.text) for each in texts]


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        ("a.tsv", 'ham\tsays "hi\nspam\twin, now\n', ("2", "1")),
        ("a.tsv", 'id\tlabel\ttext\n1\tham\tsays "hi\n2\tspam\twin, now\n', ("text", "label")),
        ("a.csv", 'text,label\n"says ""hi",ham\n"win, now",spam\n', ("text", "label")),
        (
            "a.jsonl",
            '{"text": "says \\"hi", "label": "ham"}\n\n{"text": "win, now", "label": "spam"}\n',
            ("text", "label"),
        ),
    ],
)
def test_each_type_of_file_is_read(name, content, fields, tmp_path):
    (tmp_path / name).write_text(content)
    texts = read_labelled_texts(tmp_path / name, *fields)
    assert pairs_of(texts) == [("ham", 'says "hi'), ("spam", "win, now")]


def test_lone_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800", "label": "\\udc00"}\n')
    texts = read_labelled_texts(tmp_path / "a.jsonl", "text", "label")
    assert pairs_of(texts) == [("\ufffd", "a\ufffd")]


def test_columns_are_numbered_from_1(tmp_path):
    (tmp_path / "a.tsv").write_text("ham\thi\n")
    for field in ("0", "3", "²"):
        with pytest.raises(InputError, match=f"a.tsv:1: expected a column '{field}', got ham, hi"):
            read_labelled_texts(tmp_path / "a.tsv", field, "1")


@pytest.mark.parametrize(("number", "label"), [(3, "3"), (1.5, "1.5")])
def test_numbers_are_labels_in_json(number, label, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "label": number}))
    assert read_labelled_texts(tmp_path / "a.jsonl", "text", "label")[0].label == label


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"a\.txt: expected a file \.tsv, \.csv, \.jsonl, got 'a\.txt'"),
        ("a.tsv", "", r"a\.tsv: expected a text and a label per line, got an empty file"),
        ("a.tsv", "text\tlabel\n", "got an empty file"),
        ("a.jsonl", "", r"a\.jsonl: expected a JSON object per line, got an empty file"),
        ("a.tsv", "ham\thi\n", r"a\.tsv:1: expected a column 'text', got ham, hi; name the col"),
        ("a.tsv", "label\ttext\nham\n", r"a\.tsv:2: expected 2 columns, as in the first line, g"),
        ("a.tsv", "label\ttext\nham\thi\n \thi\n", r"a\.tsv:3: label: expected a label, got ' '"),
        ("a.csv", 'text,label\na,b\n"x"y,z\n', r"a\.csv: expected csv in UTF-8, got damage after"),
        ("a.csv", b"text,label\n\xff,b\n", r"a\.csv: expected csv in UTF-8, got damage after"),
        ("a.jsonl", '{"text": "x"}', r"a\.jsonl:1: expected a key 'label', got 'text'; name"),
        ("a.jsonl", '{"text": 1, "label": "x"}', r"a\.jsonl:1: text: expected text, got 1"),
        ("a.jsonl", '{"text": "x", "label": null}', r"a\.jsonl:1: label: expected a label, got N"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{', r"a\.jsonl:2: expected a JSON object, got"),
    ],
)
def test_bad_files_raise_and_name_the_line(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_labelled_texts(file, "text", "label")
    assert "\n" not in str(error.value)


def test_the_first_of_equal_texts_is_kept():
    texts = texts_of(("ham", "a"), ("spam", "b"), ("ham", "a"), ("ham", "c"), ("spam", "a"))
    kept, num_contradictions = without_copies(texts)
    assert [each.place for each in kept] == ["f:1", "f:2", "f:4"]
    assert num_contradictions == 1


def test_balanced_texts_have_the_number_of_the_rarest_label():
    texts = texts_of(*[("ham", str(i)) for i in range(20)], ("spam", "x"), ("spam", "y"))
    found = balanced(texts, seed=0)
    assert collections.Counter(each.label for each in found) == {"ham": 2, "spam": 2}
    assert [int(each.place[2:]) for each in found] == sorted(int(each.place[2:]) for each in found)
    assert balanced(texts, seed=0) == found
    assert balanced(texts, seed=1) != found


def test_parts_hold_each_text_once_and_depend_on_the_seed():
    texts = texts_of(*[(("ham", "spam")[i % 2], str(i)) for i in range(101)])
    parts = split(texts, seed=3)
    assert (len(parts.train), len(parts.val), len(parts.test)) == (71, 10, 20)
    assert parts.labels == ("ham", "spam")
    together = [*parts.train, *parts.val, *parts.test]
    assert sorted(pairs_of(together)) == sorted(pairs_of(texts))
    assert split(texts, seed=3) == parts
    assert split(texts, seed=4) != parts


def test_one_label_raises():
    texts = texts_of(*[("ham", str(i)) for i in range(20)])
    with pytest.raises(InputError, match="expected two labels or more in the training part, got"):
        split(texts, seed=0)


def test_a_label_that_the_training_part_does_not_have_raises():
    texts = texts_of(*[(("ham", "spam")[i % 2], str(i)) for i in range(20)], ("rare", "x"))
    message = "^f:21: expected a label of the training part, ham, spam, got 'rare'; give more"
    with pytest.raises(InputError, match=message):
        split(texts, seed=5)


def test_too_few_texts_raise():
    texts = texts_of(("ham", "a"), ("spam", "b"), ("spam", "c"))
    with pytest.raises(InputError, match="a validation and a test part, got 3, 0 and 0"):
        split(texts, seed=0)


def test_the_mean_class_weight_is_1_and_each_label_weighs_the_same():
    texts = texts_of(*[("ham", str(i)) for i in range(6)], ("spam", "x"), ("spam", "y"))
    ham, spam = class_weights(texts, ("ham", "spam"))
    assert 6 * ham == pytest.approx(2 * spam)
    assert 6 * ham + 2 * spam == pytest.approx(8)
