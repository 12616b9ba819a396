"""Runs of the task prefer: the reference, the first loss, evaluations, resumes and bad input."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tritium.train.finetune.prefer import bootstrap_interval, open_data
from tritium.train.finetune.start import finetune_config
from tritium.train.run.metrics import read_metrics
from tritium.train.run.models import open_model

pytestmark = pytest.mark.plain


@pytest.fixture
def model(tiny, tritium, tmp_path):
    """A run with a context that is long enough for the pairs."""
    words = ("--context-tokens", 48, "--steps", 2, "--checkpoint-interval", 2)
    status, _, err = tritium(*tiny, *words)
    assert status == 0, err
    return tmp_path / "run"


@pytest.fixture
def pairs(tmp_path):
    """A file of pairs that differ in one word."""
    file = tmp_path / "pairs.json"
    records = [
        {"prompt": f"say {i}", "chosen": f"yes {i * i}", "rejected": f"no {i}"} for i in range(40)
    ]
    file.write_text(json.dumps(records))
    return file


@pytest.fixture
def words(model, pairs, tmp_path):
    options = {"lr": 0.01, "batch-size": 4, "epochs": 1, "checkpoint-interval": 4, "device": "cpu"}
    options |= {"out": tmp_path / "prefer", "sample-tokens": 4}
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return ["finetune", "prefer", model, "--data", pairs, *flags]


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def test_rows_are_at_most_as_long_as_the_context(model, words, pairs, tritium):
    """A prefix of 4 tokens leaves a context of 44, which is no multiple of the row width 8."""
    long = [{"prompt": "say", "chosen": f"{i} " * 40, "rejected": f"no {i}"} for i in range(40)]
    equal = [{"prompt": "say", "chosen": "yes", "rejected": "yes"}] * 2
    no_room = [{"prompt": "say " * 40, "chosen": "yes", "rejected": "no"}] * 3
    pairs.write_text(json.dumps([*long, *equal, *no_room]))
    status, _, err = tritium(*words, "--prefix-tokens", 4)
    assert status == 0, err
    assert "; pairs cut at 44 tokens: 40; pairs of equal answers left out: 2; " in err
    assert "; left out without room for an answer: 3\n" in err


@pytest.mark.parametrize("more", [[], ["--lora", 2, "--length-normalize", "--micro-batch-size", 2]])
def test_a_run_starts_at_log_2_prefers_chosen_answers_and_resumes(more, words, tritium, tmp_path):
    status, out, err = tritium(*words, *more)
    assert status == 0, err
    run = tmp_path / "prefer"
    training, evaluations = read_metrics(run)
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = evaluations[-1]
    assert last["val_margin"] > 0
    assert 0.5 < last["val_accuracy"] <= 1
    assert "margin" in out
    assert "over all 2 held-out pairs" in out
    assert "\n\n\n" not in out, "no blank lines in place of a sample"
    assert "test margin" in err
    margins = [json.loads(line) for line in (run / "margins.jsonl").read_text().splitlines()]
    assert [row["split"] for row in margins] == ["validation"] * 2 + ["test"] * 4
    assert last["val_margin"] == pytest.approx(sum(row["margin"] for row in margins[:2]) / 2)
    assert all(0 <= row["record"] < 40 for row in margins)

    before = weights(run, len(training))
    reference = (run / "reference.json").read_bytes()
    shutil.rmtree(run / "checkpoints" / f"step-{len(training)}")
    status, _, err = tritium("finetune", "--resume", run)
    assert status == 0, err
    assert all(
        torch.equal(value, weights(run, len(training))[name]) for name, value in before.items()
    )
    assert (run / "reference.json").read_bytes() == reference
    assert open_model(run).load()(torch.arange(8)[None]).isfinite().all()


def test_pairs_that_are_left_out_are_counted(model, pairs):
    more = [
        {"prompt": "say", "chosen": "yes", "rejected": "yes"},
        {"prompt": "say" * 16, "chosen": "yes", "rejected": "no"},
        {"prompt": "say", "chosen": "yes" * 16, "rejected": "no"},
    ]
    pairs.write_text(json.dumps(json.loads(pairs.read_text()) + more))
    config = finetune_config("prefer", model, pairs, device="cpu", row_tokens=40)
    line = open_data(config).describe(config)
    assert "; pairs cut at 40 tokens: 1; pairs of equal answers left out: 1;" in line
    assert line.endswith("; left out without room for an answer: 1")


def test_answers_that_are_equally_likely_are_not_right(words, tritium, tmp_path):
    assert tritium(*words, "--lr", 1e-30)[0] == 0
    (*_, last) = read_metrics(tmp_path / "prefer")[1]
    assert last["val_margin"] == last["val_accuracy"] == 0
    assert last["val_loss"] == pytest.approx(math.log(2))


def test_a_damaged_reference_is_one_line(words, tritium, error_of, tmp_path):
    assert tritium(*words)[0] == 0
    run = tmp_path / "prefer"
    file = run / "reference.json"
    content = file.read_text()
    shutil.rmtree(run / "checkpoints" / "step-9", ignore_errors=True)
    file.write_text(content.replace("-", "", 1))
    assert "damaged or missing (it does not match its checksum)" in error_of(
        "train", "--resume", run
    )
    file.unlink()
    assert "reference.json: damaged or missing" in error_of("train", "--resume", run)


def test_other_data_that_the_run_cannot_use_changes_no_option(words, pairs, tritium, tmp_path):
    assert tritium(*words)[0] == 0
    run = tmp_path / "prefer"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(pairs.read_text())[1:]))
    before = (run / "config.json").read_bytes()
    change = ("--change", f"data={other}", "--change", "steps=20")
    status, _, err = tritium("finetune", "--resume", run, *change)
    assert status == 2
    assert "expected the pairs of answers with which the run was started" in err
    assert (run / "config.json").read_bytes() == before


def test_bad_pairs_and_options_are_one_line(words, pairs, error_of):
    assert "--beta: expected a number above 0" in error_of(*words, "--beta", 0)
    assert "--label-smoothing: expected a number in [0, 0.5)" in error_of(
        *words, "--label-smoothing", 0.5
    )
    line = error_of(*words, "--row-tokens", 4)
    assert "expected pairs with two different answers that begin within 4 tokens" in line
    records = json.loads(pairs.read_text())
    del records[6]["rejected"]
    pairs.write_text(json.dumps(records))
    assert "pairs.json: record 7: expected the key 'rejected'" in error_of(*words)
    pairs.write_text("[]")
    assert "expected a list of records, got an empty list" in error_of(*words)


def test_bootstrap_interval_is_about_two_standard_errors():
    values = np.random.default_rng(0).normal(1.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=0)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_the_bootstrap_interval_covers_95_percent():
    values = np.linspace(-1, 1, 400)
    low, high = bootstrap_interval(values, seed=0)
    width = 2 * 1.96 * values.std() / np.sqrt(len(values))
    assert high - low == pytest.approx(width, rel=0.1)
