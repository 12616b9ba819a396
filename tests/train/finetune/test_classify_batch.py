"""Texts as packed rows, and the weights of their labels."""

import numpy as np
import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPTClassifier, GPTConfig
from tritium.train.data.tokenizers.tokenizer import from_spec
from tritium.train.finetune.classify_batch import (
    classify_texts,
    encode_labelled,
    encode_text,
    text_inputs,
)
from tritium.train.finetune.classify_records import LabelledText

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")
BYTES = from_spec("bytes", list)
TEXTS = [
    LabelledText(text=text, label=label, place=f"f:{number}")
    for number, (text, label) in enumerate([("abc", "x"), ("", "y"), ("defgh", "x")], 1)
]


def test_texts_are_packed_into_the_fewest_rows_of_equal_length():
    texts = [np.arange(n) for n in (3, 1, 5, 4)]
    inputs = text_inputs(texts, 6, CPU)
    assert inputs["tokens"].shape == (3, 5)  # 13 tokens and 2 of padding
    flat = inputs["tokens"].flatten()
    assert flat[:13].tolist() == np.concatenate(texts).tolist()
    assert inputs["last"].tolist() == [2, 3, 8, 12]
    assert inputs["cu_seqlens"].tolist() == [0, 3, 4, 9, 13, *[15] * 4]
    assert inputs["cu_seqlens"].dtype == torch.int32
    assert text_inputs(texts[:1] * 4, 6, CPU)["tokens"].shape == (2, 6)  # no padding


def test_texts_have_labels_weights_and_at_least_one_token():
    batch, num_cut = encode_labelled(TEXTS, "xy", BYTES, most_tokens=4, weights=[0.75, 1.5])
    assert [ids.tolist() for ids in batch.texts] == [list(b"abc"), [256], list(b"defg")]
    assert num_cut == 1
    assert encode_labelled(TEXTS, "xy", BYTES, most_tokens=5)[1] == 0
    assert batch.label.tolist() == [0, 1, 0]
    assert batch.loss_weight.tolist() == [0.75, 1.5, 0.75]
    assert batch.tokens == 8
    part = batch[1:]
    assert len(part) == 2
    assert part.model_inputs(CPU)["label"].tolist() == [1, 0]
    assert batch[np.array([2, 0])].label.tolist() == [0, 0]
    assert batch.without_targets().num_targets.tolist() == [0, 0, 0]


def test_a_text_longer_than_the_context_has_the_probabilities_of_its_start():
    config = GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=257, context_tokens=8)
    model = GPTClassifier(config, ("x", "y")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    found, other, start = classify_texts(model, BYTES, ["abcdefghijkl", "b", "abcdefgh"])
    assert found == pytest.approx(start, rel=1e-5)
    assert found != pytest.approx(other, rel=1e-2)


def test_the_seed_of_dropout_reaches_the_model():
    batch, _ = encode_labelled(TEXTS, "xy", BYTES, most_tokens=4, weights=[0.75, 1.5])
    assert batch.model_inputs(CPU, dropout_seed=3)["dropout_seed"].item() == 3
    assert "dropout_seed" not in batch.model_inputs(CPU)


def test_a_character_without_a_token_is_named_with_its_line():
    tokenizer = from_spec("chars", lambda: ["abc"])
    with pytest.raises(InputError, match=r"^f:3: tokenizer chars: expected one of"):
        encode_labelled(TEXTS, "xy", tokenizer, most_tokens=4)


def test_start_tokens_come_before_a_text():
    tokenizer = from_spec("bytes", list)
    tokenizer.start_tokens = (9,)
    assert encode_text(tokenizer, "a").tolist() == [9, 97]
