"""Runs of the task classify: their results, resumes, ranks, precision, export and bad input."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tritium.errors import InputError
from tritium.train.api import load
from tritium.train.distributed.world import SINGLE_PROCESS
from tritium.train.execution import resolve
from tritium.train.finetune.classify import open_data
from tritium.train.finetune.start import finetune_config
from tritium.train.run.folder import read_run
from tritium.train.run.metrics import read_metrics
from tritium.train.run.models import open_model

pytestmark = pytest.mark.plain

ANIMALS = ("dog", "cat", "owl", "ant", "bee", "cow", "pig", "hen")


@pytest.fixture
def file(tmp_path) -> Path:
    """40 different texts with 2 labels, which the first word tells, and 2 copies."""
    rows = [(("big", "small")[i % 2], ANIMALS[i % 8], f"number {i}") for i in range(40)]
    rows += rows[:2]
    path = tmp_path / "animals.tsv"
    path.write_text("".join(f"{size}\t{size} {name} {rest}\n" for size, name, rest in rows))
    return path


@pytest.fixture
def command(base, file, tmp_path) -> list:
    words = ["finetune", "classify", base, "--data", file, "--out", tmp_path / "tuned"]
    words += ["--text-column", "2", "--label-column", "1", "--device", "cpu", "--lr", "1e-2"]
    return [*words, "--batch-size", "4", "--min-lr", "1e-2"]


@pytest.fixture
def tune(command, tritium, tmp_path):
    """Train a classifier: tune("--epochs", 2) -> folder of the run, and what it printed."""

    def call(*words) -> tuple[Path, str]:
        status, _, err = tritium(*command, *words)
        assert status == 0, err
        return tmp_path / "tuned", err

    return call


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def test_a_run_learns_labels_and_writes_test_results(tune, monkeypatch, tritium):
    run, err = tune("--epochs", 12, "--evals-per-epoch", 1)
    assert "40 texts: 20 big, 20 small; copies of a text left out: 2" in err
    assert "28 training, 4 validation and 8 test texts; 12 epochs in 84 steps of 4 texts" in err
    assert "precision     recall         F1" in err
    assert read_run(run).labels == ["big", "small"]
    last = read_metrics(run)[1][-1]
    assert last["val_accuracy"] == last["val_f1"] == last["val_recall/small"] == 1
    assert last["val_loss"] < 0.3
    results = json.loads((run / "test.json").read_text())
    assert results["accuracy"] == 1
    assert sum(map(sum, results["confusion"])) == results["texts"] == 8
    assert (run / "confusion.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert all(line["prediction"] == line["label"] for line in lines)
    assert "(label small): small" in (run / "samples.txt").read_text()


def test_a_resumed_run_ends_bitwise_like_an_unbroken_one(tune, file, tritium, monkeypatch):
    monkeypatch.chdir(file.parent)
    words = ("--data", file.name, "--steps", 6, "--checkpoint-interval", 3, "--class-weights")
    run, _ = tune(*words, "--dropout", 0.1)
    broken = run.with_name("broken")
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "step-6")
    for name in ("test.json", "predictions.jsonl"):
        (broken / name).unlink()
    shutil.rmtree(run.with_name("base"))  # a resumed run does not need it
    assert tritium("finetune", "--resume", broken)[0] == 0
    first = weights(run, 6)
    for name, value in weights(broken, 6).items():
        assert torch.equal(first[name], value), name
    for name in ("test.json", "predictions.jsonl"):
        assert (run / name).read_bytes() == (broken / name).read_bytes()


@pytest.mark.parametrize("trained_blocks", [0, 1])
def test_frozen_weights_stay_and_have_no_optimizer_state(trained_blocks, tune):
    run, _ = tune("--steps", 3, "--trained-blocks", trained_blocks)
    before = weights(run, 0)
    changed = {name for name, value in weights(run, 3).items() if not value.equal(before[name])}
    state = load_file(run / "checkpoints" / "step-3" / "optimizer.safetensors")
    with_state = {name.rpartition(".")[0] for name in state}
    starts = ("score.", "ln_f.", "h.0.") if trained_blocks else ("score.",)
    assert with_state == changed == {name for name in before if name.startswith(starts)}


def test_lora_and_the_head_are_trained_and_the_run_classifies(tune, tritium):
    run, _ = tune("--steps", 2, "--lora", 2)
    before = weights(run, 0)
    changed = {name for name, value in weights(run, 2).items() if not value.equal(before[name])}
    assert changed == {name for name in before if "lora_" in name or name == "score.weight"}
    assert load(run).classify(["big dog"])[0].keys() == {"big", "small"}
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    (found,) = load(run).classify([lines[0]["text"]])  # with LoRA added to the weights
    assert found[lines[0]["prediction"]] == pytest.approx(lines[0]["probability"], abs=1e-5)
    status, _, err = tritium("export", run, run.with_name("exported"))
    assert status == 0, err
    assert load(run.with_name("exported")).classify([lines[0]["text"]]) == [pytest.approx(found)]
    status, _, err = tritium("export", run, run.with_name("adapter"), "--adapter")
    assert status == 2
    assert "whose head is not part of an adapter" in err


def test_micro_batches_have_the_gradients_of_the_batch(command, tritium):
    """With class weights too: a mean of means with other weights would differ."""
    steps = ["--steps", 2, "--class-weights"]
    tritium(*command, *steps)
    out = command[command.index("--out") + 1]
    tritium(*command, *steps, "--micro-batch-size", 1, "--out", out.with_name("micro"))
    norms = [
        [line["grad_norm"] for line in read_metrics(run)[0]]
        for run in (out, out.with_name("micro"))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_match_one_process(parallel, tune, launch, tritium):
    """From a checkpoint with optimizer state of some weights only."""
    one, _ = tune("--steps", 1, "--trained-blocks", 0)
    two = one.with_name("two")
    shutil.copytree(one, two)
    change = ["--change", "steps=3"]
    assert tritium("train", "--resume", one, *change)[0] == 0
    status, _, errors = launch(2, "--resume", two, *change, "--parallel", parallel)
    assert status == [0, 0], errors
    found = [read_metrics(run) for run in (one, two)]
    for name in ("loss", "grad_norm"):
        values = [[line[name] for line in training] for training, _ in found]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    last = [evaluations[-1] for _, evaluations in found]
    assert last[0] == pytest.approx(last[1], rel=1e-4)
    results = [json.loads((run / "test.json").read_text()) for run in (one, two)]
    assert results[0]["confusion"] == results[1]["confusion"]


def test_an_evaluation_counts_the_texts_of_all_ranks(base, file):
    config = finetune_config("classify", base, file, text_column="2", label_column="1")
    data = open_data(config)
    model = data.adapt(open_model(base).load(), config).eval()
    batches = list(data.evaluation_batches(config, resolve(config), is_last=True))
    two = SimpleNamespace(mean=SINGLE_PROCESS.mean, data_ranks=2)  # with the same texts on both
    found, expected = (data.evaluate(model, batches, each) for each in (two, SINGLE_PROCESS))
    assert found.tokens == 2 * expected.tokens
    assert found.loss == pytest.approx(expected.loss)
    assert found.more == expected.more


def test_bfloat16_gives_the_loss_of_float32_to_rounding(tune, command, tritium, tmp_path):
    run, _ = tune("--steps", 2)
    out = tmp_path / "narrow"
    assert tritium(*command, "--steps", 2, "--precision", "bfloat16", "--out", out)[0] == 0
    losses = [[line["loss"] for line in read_metrics(each)[0]] for each in (run, out)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_an_exported_classifier_gives_transformers_the_same_probabilities(tune, tritium, tmp_path):
    transformers = pytest.importorskip("transformers")
    run, _ = tune("--epochs", 4)
    out = tmp_path / "exported"
    status, printed, err = tritium("export", run, out)
    assert status == 0, err
    assert "AutoModelForSequenceClassification" in printed
    card = (out / "README.md").read_text()
    assert "text-classification" in card
    assert "tritium finetune classify" in card
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    classify = transformers.pipeline("text-classification", str(out), device="cpu", batch_size=4)
    found = classify([line["text"] for line in lines])
    for each, line in zip(found, lines, strict=True):
        assert each["label"] == line["prediction"]
        assert each["score"] == pytest.approx(line["probability"], abs=1e-5)
    assert open_model(out).load_classifier().labels == ("big", "small")


def test_texts_that_are_cut_or_left_out_are_counted(base, file):
    texts = file.read_text() + "big\t" + "x" * 100 + "\nbig\tlast\n"
    file.write_text(texts)
    options = {"text_column": "2", "label_column": "1", "row_tokens": 30, "balance": True}
    data = open_data(finetune_config("classify", base, file, **options))
    assert data.note.startswith("40 texts: 20 big, 20 small; copies of a text left out: 2")
    assert "another label" not in data.note
    assert max(len(ids) for rows in data.rows.values() for ids in rows.texts) <= 30


def test_copies_with_another_label_are_counted(base, file):
    file.write_text(file.read_text() + "small\tbig dog number 0\nsmall\tone more\n")
    options = {"text_column": "2", "label_column": "1"}
    data = open_data(finetune_config("classify", base, file, **options))
    assert (
        "21 small, 20 big; copies of a text left out: 3; copies with another label than the "
        "first: 1"
    ) in data.note


# --- bad input


def test_a_classifier_is_not_used_as_a_language_model(tune, error_of):
    run, _ = tune("--steps", 1)
    message = error_of("sample", run)
    assert "expected a language model, got a classifier of big, small" in message
    opened = load(run)
    assert opened.classify(["big dog", "small cat"])[1].keys() == {"big", "small"}
    with pytest.raises(InputError, match="expected a language model, got a classifier"):
        opened.sample("big")
    with pytest.raises(InputError, match="expected a classifier, got a language model"):
        load(run.with_name("base")).classify(["big dog"])


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("", (), "expected a text and a label per line, got an empty file"),
        ("big\ta\nsmall\n", (), "animals.tsv:2: expected 2 columns, as in the first line, got 1"),
        (None, ("--label-column", "kind"), "animals.tsv:1: expected a column 'kind', got big, big"),
        ("".join(f"big\t{i}\n" for i in range(20)), (), "expected two labels or more in the"),
        (
            "".join(f"{'ab'[i % 2]}\t{i}\n" for i in range(20)) + "c\tx\n",
            ("--seed", 5),
            "animals.tsv:21: expected a label of the training part, a, b, got 'c'",
        ),
        (None, ("--trained-blocks", 2), "--trained-blocks: expected 0 to 1, the blocks of the"),
        (None, ("--lora", 2, "--trained-blocks", 1), "--trained-blocks: expected none with"),
        (None, ("--prefix-tokens", 2), "--prefix-tokens: expected 0 in the task classify"),
        (None, ("--eval-text", "a=b"), "--eval-text: expected none, because a classifier predicts"),
        (None, ("--attention", "sdpa"), "--attention: expected tritium in the task classify"),
        (None, ("--row-tokens", 65), "--row-tokens: expected at most the context of 64 tokens"),
    ],
)
def test_bad_input_is_one_line(content, words, message, command, file, error_of):
    if content is not None:
        file.write_text(content)
    assert message in error_of(*command, *words)
    assert not command[command.index("--out") + 1].exists()
