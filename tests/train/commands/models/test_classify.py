"""tritium classify: a label per line."""

import io
import json

import pytest
import torch

from tritium.model import GPT, GPTClassifier, GPTConfig
from tritium.train.data.tokenizers.tokenizer import from_spec

pytestmark = pytest.mark.plain


@pytest.fixture
def folder(tmp_path):
    """A classifier of bytes, in a Hugging Face folder."""
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=257, context_tokens=8)
    model = GPTClassifier(config, ("ham", "spam"))
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path / "model", end_of_text=256)
    from_spec("bytes", list).save(tmp_path / "model" / "tritium_tokenizer.json")
    return tmp_path / "model"


@pytest.fixture
def classify(folder, tritium, monkeypatch):
    def call(content: bytes, *words):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return tritium("classify", folder, "--device", "cpu", *words)

    return call


def test_each_line_gets_a_label_and_a_probability(classify, folder):
    lines = ["win a prize", "see you", "", "¡café!"]  # the first is longer than the context
    status, out, err = classify("\n".join(lines).encode() + b"\r\n", "--batch-size", 3)
    assert status == 0, err
    assert len(out.splitlines()) == 4
    model = GPTClassifier.from_pretrained(folder)
    for line, printed in zip(lines, out.splitlines(), strict=True):
        ids = torch.tensor([list(line.encode())[:8] or [256]])
        probabilities = model(ids, torch.tensor([ids.shape[1] - 1])).softmax(1)[0]
        label, probability = printed.split("\t")
        assert label == model.labels[probabilities.argmax()]
        assert float(probability) == pytest.approx(probabilities.max().item(), abs=1e-4)


def test_json_has_the_probabilities_of_all_labels(classify):
    status, out, _ = classify(b"hello\n", "--json")
    assert status == 0
    record = json.loads(out)
    assert record["probabilities"].keys() == {"ham", "spam"}
    assert sum(record["probabilities"].values()) == pytest.approx(1)
    assert record["probability"] == record["probabilities"][record["label"]]


def test_bad_input_is_one_line(classify, error_of, folder, monkeypatch, tmp_path):
    status, _, err = classify(b"")
    assert status == 2
    assert err == "tritium: classify: expected a text per line on the standard input, got none\n"
    status, _, err = classify(b"fine\n\xff\n", "--batch-size", 1)
    assert status == 2
    assert err.startswith("tritium: standard input:2: expected UTF-8 text, got ")
    GPT(GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=257)).save_pretrained(
        tmp_path / "gpt"
    )
    message = error_of("classify", tmp_path / "gpt", "--tokenizer", "bytes")
    assert "expected a model that classifies texts, got a language model" in message
    assert "expected 1 or more, got 0" in error_of("classify", folder, "--batch-size", 0)
