import json

import pytest
import torch
import torch.nn.functional as F

from tritium.train.run.metrics import read_metrics
from tritium.train.storage.files import hash_file

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
    assert (record["options"]["batch_size"], record["options"]["precision"]) == (3, "auto")
    assert set(record["versions"]) == {"tritium", "torch", "triton", "python"}
    (text,) = record["results"]["texts"]
    assert text["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert text["targets"] == text["tokens"] - 1
    assert len(text["sha256"]) == 64


def test_the_model_is_opened_with_the_chosen_precision(tritium, run, corpus, tmp_path):
    words = ("--precision", "bfloat16", "--json", tmp_path / "out.json")
    assert tritium("eval", "perplexity", run, corpus, *words)[0] == 0
    assert json.loads((tmp_path / "out.json").read_text())["precision"] == "bfloat16"


@torch.no_grad()
def losses_of_transformers(model, tokens: torch.Tensor, context: int, stride: int) -> list[float]:
    """Return the loss of each token after the first, in the first window that predicts it."""
    losses = []
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens) - 1)
        logits = model(tokens[None, begin:end]).logits[0, len(losses) - begin :].double()
        losses += F.cross_entropy(
            logits, tokens[len(losses) + 1 : end + 1], reduction="none"
        ).tolist()
        if end == len(tokens) - 1:
            return losses


@torch.no_grad()
def loss_of_the_guide(model, tokens: torch.Tensor, context: int, stride: int) -> float:
    """Return the loss that transformers computes from labels, weighted as its guide does."""
    total = 0.0
    weights = 0
    done = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        labels = tokens[begin:end].clone()
        labels[: done - begin] = -100
        weight = end - done - 1
        if weight > 0:
            loss = model(tokens[None, begin:end], labels=labels[None]).loss
            total += loss.item() * weight
            weights += weight
        done = end
        if end == len(tokens):
            return total / weights


@pytest.mark.slow
def test_perplexity_of_a_run_and_of_its_export_equals_that_of_transformers(
    tritium, tiny, tmp_path, corpus
):
    transformers = pytest.importorskip("transformers")
    words = ("--tokenizer", "bpe:300", "--steps", 60, "--lr", 0.01)
    assert tritium(*tiny, *words)[0] == 0
    assert tritium("export", tmp_path / "run", tmp_path / "exported")[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text()[:700] + " größer 12345 \U0001f600\n")
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]

    losses = losses_of_transformers(theirs, torch.tensor([tokenizer.eos_token_id, *ids]), 16, 5)
    assert len(losses) == len(ids)
    expected = {
        "exact": sum(losses) / len(losses),
        "huggingface": loss_of_the_guide(theirs, torch.tensor(ids), 16, 5),
    }
    assert expected["exact"] < 4.5  # the model has learned: a uniform guess has 5.7
    for model in ("run", "exported"):
        for counting, loss in expected.items():
            words = ("--stride", 5, "--counting", counting, "--json", tmp_path / "out.json")
            status, _, err = tritium("eval", "perplexity", tmp_path / model, text, *words)
            assert (status, err) == (0, "")
            (found,) = json.loads((tmp_path / "out.json").read_text())["results"]["texts"]
            assert found["tokens"] == len(ids)
            assert found["loss"] == pytest.approx(loss, rel=1e-5)


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


def test_choice_prints_and_writes_metrics(tritium, run, tmp_path, monkeypatch):
    lines = [
        {"context": "the quick", "choices": [" fox", " brown"], "label": 1},
        {"context": "the lazy", "choices": [" dog", " fox"], "label": 0},
    ]
    file = tmp_path / "choices.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    words = ("--limit", 1, "--json", tmp_path / "out.json")
    monkeypatch.chdir(tmp_path)
    status, out, err = tritium("eval", "choice", run, file.name, *words)
    assert (status, err) == (0, "")
    assert "choices.jsonl: 1 example of the task plain" in out
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (results["path"], results["sha256"]) == (str(file), hash_file(file))
    for name in ("accuracy_sum", "accuracy_per_token", "accuracy_per_character"):
        assert f"{name:24} {results[name]:.4f}" in out


def test_bleu_writes_how_texts_are_split(tritium, error_of, run, tmp_path):
    pytest.importorskip("sacrebleu")
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "the quick", "reference": "brown fox"}')
    words = ("--max-new-tokens", 4, "--tokenize")
    status, out, err = tritium("eval", "bleu", run, file, *words, "char", "--json", tmp_path / "o")
    assert (status, err) == (0, "")
    assert "tok:char" in out
    record = json.loads((tmp_path / "o").read_text())
    assert record["options"]["tokenize"] == "char"
    assert "tok:char" in record["results"]["signature"]
    assert "--tokenize: unknown name 'chars'" in error_of(
        "eval", "bleu", run, file, *words, "chars"
    )


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
