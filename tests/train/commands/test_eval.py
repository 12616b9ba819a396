import json

import pytest

from tritium.train.files import hash_file
from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain


@pytest.fixture
def run(tritium, tiny, tmp_path):
    assert tritium(*tiny, "--steps", 2)[0] == 0
    return tmp_path / "run"


def test_perplexity_of_the_validation_split_is_that_of_the_run(tritium, run, tmp_path):
    dataset = json.loads((run / "config.json").read_text())["dataset"]
    file = tmp_path / "out.json"
    words = ("--stride", 16, "--batch-size", 3, "--json", file)
    status, out, err = tritium("eval", "perplexity", run, dataset, *words)
    assert (status, err) == (0, "")
    last = read_metrics(run)[1][-1]
    assert f"{last['val_loss']:.4f} nats per token" in out
    assert f"{last['val_bits_per_byte']:.4f} bits per byte" in out

    record = json.loads(file.read_text())
    weights = run / "checkpoints" / "step-2" / "model.safetensors"
    assert record["model"] == {
        "path": str(weights.parent),
        "sha256": {"model.safetensors": hash_file(weights)},
    }
    assert record["tokenizer"]["name"] == "bytes"
    assert (record["precision"], record["device"]) == ("float32", "cpu")
    assert record["options"]["batch_size"] == 3
    assert set(record["versions"]) == {"tritium", "torch", "triton", "python"}
    (text,) = record["results"]["texts"]
    assert text["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert text["targets"] == text["tokens"] - 1
    assert len(text["sha256"]) == 64


def test_several_texts_and_the_counting_of_transformers(tritium, run, corpus, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "the quick brown fox jumps"}\n{"text": "lazy dog"}\n')
    status, out, err = tritium("eval", "perplexity", run, lines, lines)
    assert (status, err) == (0, "")
    assert out.count("lines.jsonl: ") == 2
    assert "over 33 tokens" in out
    words = ("--counting", "huggingface", "--context-tokens", 8)
    status, out, _ = tritium("eval", "perplexity", run, lines, *words)
    assert out.startswith("context 8, stride 4, counting huggingface")
    assert "over 31 tokens" in out


def test_a_json_file_that_cannot_be_written_is_found_before_the_work(tritium, tmp_path):
    for file, found in ((tmp_path / "no" / "a.json", "no folder"), (tmp_path, "a folder")):
        status, out, err = tritium("eval", "perplexity", tmp_path / "model", "a", "--json", file)
        assert (status, out) == (2, "")
        assert err.startswith("tritium: --json: expected a file in a folder that exists")
        assert found in err


def test_choice_prints_and_writes_metrics(tritium, run, tmp_path):
    lines = [
        {"context": "the quick", "choices": [" fox", " brown"], "label": 1},
        {"context": "the lazy", "choices": [" dog", " fox"], "label": 0},
    ]
    file = tmp_path / "choices.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    words = ("--limit", 1, "--json", tmp_path / "out.json")
    status, out, err = tritium("eval", "choice", run, file, *words)
    assert (status, err) == (0, "")
    assert "1 examples of the task plain" in out
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["sha256"] == hash_file(file)
    for name in ("accuracy_sum", "accuracy_per_token", "accuracy_per_character"):
        assert f"{name:24} {results[name]:.4f}" in out


def test_bad_input_is_one_line(error_of, run, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("short")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "a", "choices": [" b", " c"], "label": 0}\n{"context"')
    expected = {
        ("perplexity", run, short): "short.txt: expected at least 16 tokens, one window, got 5",
        ("perplexity", run, short, "--stride", 0): "--stride: expected 1 to 16",
        ("perplexity", run, short, "--context-tokens", 17): "--context-tokens: expected 1 to 16",
        ("perplexity", run, short, "--batch-size", 0): "--batch-size: expected 1 or more",
        ("perplexity", run): "expected one text or more after MODEL, got none",
        ("perplexity", run, tmp_path / "none.txt"): "none.txt: No such file",
        ("perplexity", tmp_path, short): "expected a run, a checkpoint",
        ("choice", run, bad): "bad.jsonl:2: expected a JSON object",
        ("choice", run, bad, "--limit", 0): "--limit: expected 1 or more",
        ("perplexty", run): "unknown eval command 'perplexty'; did you mean 'perplexity'?",
    }
    for words, message in expected.items():
        assert message in error_of("eval", *words)
    bad.write_text('{"context": "a", "choices": [" b", " c"], "label": 2}\n')
    assert "bad.jsonl:1: label: expected 0 to 1, got 2" in error_of("eval", "choice", run, bad)
    bad.write_text('{"context": "a", "choices": [" b", ""], "label": 0}\n')
    assert "bad.jsonl:1: choices: expected text in choice 1" in error_of("eval", "choice", run, bad)


def test_missing_extras_are_one_line(error_of, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("lm-eval", "bleu"):
        error = error_of("eval", command, tmp_path, tmp_path / "file.jsonl")
        assert "found none; pip install 'tritium[eval]'" in error


def test_help_lists_the_commands(tritium):
    status, out, _ = tritium("eval")
    assert status == 0
    assert all(name in out for name in ("perplexity", "choice", "lm-eval", "bleu"))
    assert "--num_fewshot" in tritium("eval", "lm-eval", "--help")[1]
