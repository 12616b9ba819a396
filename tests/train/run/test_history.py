"""Resuming a run with other options: what may change, and what config.json records."""

import json
import shutil

import pytest

from tritium.train.run.checkpoint import checkpoints
from tritium.train.run.folder import read_run
from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain


def files(run, step) -> list[bytes]:
    folder = checkpoints(run)[step]
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def rates(run) -> dict[int, float]:
    return {row["step"]: row["lr"] for row in read_metrics(run)[0]}


def test_a_finished_run_that_is_extended_equals_a_longer_run(tiny, tritium, tmp_path):
    """With a constant learning rate. Changes of the result are recorded with their step."""
    tiny = [*tiny, "--schedule", "constant", "--eval-interval", "1000"]
    run, longer = tmp_path / "run", tmp_path / "longer"
    assert tritium(*tiny, "--steps", 10)[0] == 0
    assert tritium(*tiny, "--out", longer)[0] == 0
    status, _, err = tritium("train", "--resume", run, "--change", "steps=20")
    assert status == 0, err
    assert f"{run}: from step 10 on: steps 10 -> 20" in err
    assert files(run, 20) == files(longer, 20)
    assert read_run(run).train == read_run(longer).train.with_options(out=str(run))
    before = (run / "config.json").read_bytes()

    # nothing changes
    assert tritium("train", "--resume", run)[0] == 0
    assert (run / "config.json").read_bytes() == before

    # another learning rate, twice as many steps
    words = ["--change", "lr=0.5", "--change", "steps=21", "--checkpoint-interval", 7]
    assert tritium("train", "--resume", run, *words)[0] == 0
    assert rates(run)[20] == 0.5
    assert rates(run)[19] == 3e-3
    entries = read_run(run).history
    assert [(entry["step"], entry["changes"]) for entry in entries] == [
        (10, {"steps": [10, 20]}),
        (20, {"steps": [20, 21], "lr": [3e-3, 0.5], "checkpoint_interval": [10, 7]}),
    ]


def test_the_execution_may_change_and_is_recorded(tiny, tritium, tmp_path):
    """The results agree to rounding."""
    run, changed = tmp_path / "run", tmp_path / "changed"
    assert tritium(*tiny)[0] == 0
    shutil.copytree(run, changed)
    shutil.rmtree(changed / "checkpoints" / "step-20")
    words = ["--micro-batch-size", 2, "--attention", "sdpa", "--recompute", "block"]
    status, _, err = tritium("train", "--resume", changed, *words)
    assert status == 0, err
    assert "from step 10 on: attention tritium -> sdpa, recompute none -> block, micro_ba" in err
    record = read_run(changed)
    assert record.train.execution.micro_batch_size == 2
    assert record.execution["micro_batch_size"] == 2
    assert record.history[0]["changes"]["attention"] == ["tritium", "sdpa"]
    losses = [[row["loss"] for row in read_metrics(folder)[0]] for folder in (run, changed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert files(run, 20) != files(changed, 20)


def test_a_run_goes_on_with_other_data_of_the_same_tokenizer(tiny, tritium, error_of, tmp_path):
    """A tokenizer that was learned from the first data is kept."""
    run, second, third = (tmp_path / name for name in ("run", "second file.txt", "third.txt"))
    second.write_text("seven quick wizards fix pots\n" * 300)
    third.write_text("lazy dogs jump\n" * 300)
    assert tritium(*tiny, "--tokenizer", "chars", "--steps", 10)[0] == 0
    words = ["--change", f"data='{second}' {third}", "--change", "steps=12"]
    status, _, err = tritium("train", "--resume", run, *words)
    assert status == 0, err
    record = read_run(run)
    assert record.train.data == (str(second), str(third))
    assert record.history[0]["changes"]["data"][1] == [str(second), str(third)]
    assert tritium("train", "--resume", run, "--change", "steps=13")[0] == 0
    dataset = tmp_path / "bytes"
    assert tritium("data", "build", dataset, second, "--tokenizer", "bytes")[0] == 0
    answer = error_of("train", "--resume", run, "--change", f"data={dataset}")
    assert f"{dataset}: expected tokenizer {record.tokenizer_sha256[:12]}, with which" in answer
    assert len(read_run(run).history) == 2


@pytest.fixture
def run(tiny, tritium, tmp_path):
    assert tritium(*tiny, "--steps", 10)[0] == 0
    return tmp_path / "run"


def test_bad_changes_are_one_line_and_change_nothing(run, error_of):
    before = (run / "config.json").read_bytes()
    for words, message in (
        (["--change", "lr"], "--change: expected NAME=VALUE, such as lr=1e-4, got 'lr'"),
        (["--change", "lrr=1"], "unknown change 'lrr'; did you mean 'lr'"),
        (["--change", "n_layer=3"], "--n-layer: a resumed run keeps its value; the options that"),
        (["--change", "device=cpu"], "--change: expected --device cpu instead"),
        (["--change", "lr=fast"], "expected a number, got 'fast'"),
        (["--change", "lr=-1"], "--lr: expected 0 or more, and finite, got -1"),
        (["--change", "schedule=linear"], "invalid choice 'linear'"),
        (["--change", "steps=9"], "--steps: expected at least 10, which"),
        (["--change", "data=missing.txt"], "missing.txt"),
        (["--change", "data='a b"], 'expected paths, got "\'a b" (No closing quotation)'),
        (["--change", "data="], "--data"),
        (["--change", "data=''"], "expected paths, got \"''\""),
        (["--change", "lr=nan"], "--lr: expected 0 or more, and finite, got nan"),
        (["--lr", "3"], "--lr: expected --change lr=VALUE for a resumed run"),
        (["--n-layer=3"], "--n-layer: a resumed run keeps its value"),
        (["--out", "x"], "--out: a resumed run keeps its value"),
        (["--micro-batch-size", "3"], "expected a divisor of the batch size 4, got 3"),
        (["--precison", "float32"], "did you mean --precision"),
        (["extra"], "extra"),
    ):
        assert message in error_of("train", "--resume", run, *words), words
    assert (run / "config.json").read_bytes() == before


def test_resume_auto_starts_then_goes_on_with_the_same_command(tiny, tritium, error_of, tmp_path):
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    assert tritium(*tiny, "--out", unbroken)[0] == 0
    command = [*tiny, "--resume", "auto"]
    assert tritium(*command)[0] == 0
    assert read_run(run).history == []
    shutil.rmtree(run / "checkpoints" / "step-20")
    (run / "metrics.jsonl").write_text("")
    assert tritium(*command)[0] == 0
    assert [row["step"] for row in read_metrics(run)[0]] == list(range(10, 20))
    assert files(run, 20) == files(unbroken, 20)

    # other options
    assert "--lr: expected 0.003, as " in error_of(*command, "--lr", "2e-3")
    assert f"{run} has it, got 12" in error_of(*command, "--steps=12")
    assert tritium(*command, "--eval-tokens", 128)[0] == 0
    assert read_run(run).history[0]["changes"] == {"eval_tokens": [64, 128]}
    assert "--resume auto: expected --out" in error_of("train", "laptop", "--resume=auto")


def test_runs_without_a_history_go_on(run, tritium):
    """Runs of older versions."""
    record = json.loads((run / "config.json").read_text())
    for name in ("history", "execution", "sha256"):
        del record[name]
    del record["train"]["keep_every"], record["train"]["background_checkpoints"]
    (run / "config.json").write_text(json.dumps(record))
    assert tritium("train", "--resume", run, "--change", "steps=11")[0] == 0
    assert read_run(run).history[0]["changes"] == {"steps": [10, 11]}
    assert read_run(run).execution["ranks"] == 1
