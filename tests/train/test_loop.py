import functools
import gc
import itertools
import json
import resource
import shutil
import signal
import sys
from dataclasses import replace

import pytest
import torch

from tritium.model import attention
from tritium.train import loop, pretrain, session
from tritium.train.run.metrics import read_metrics
from tritium.train.run.plots import plot_loss
from tritium.train.storage.lock import FolderLock
from tritium.train.trainer import quiet_collector

pytestmark = pytest.mark.plain


def weights(run, step=20) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "model.safetensors").read_bytes()


def test_a_run_learns_and_writes_its_files(tiny, tritium, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "plot_loss", plot_loss)
    monkeypatch.setattr(loop, "quiet_collector", quiet_collector)
    schedule, is_enabled = session.learning_rate, []
    monkeypatch.setattr(
        session, "learning_rate", lambda *step: is_enabled.append(gc.isenabled()) or schedule(*step)
    )
    status, out, err = tritium(*tiny, "--steps", 60, "--lr", 1e-2, "--checkpoint-interval", 30)
    assert status == 0, err
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "tokenizer.json", "metrics.jsonl", "samples.txt", "loss.png", "checkpoints"
    }  # fmt: skip
    rows, evaluations = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(60))
    assert not any(is_enabled), "the garbage collector interrupts no step"
    assert [row["step"] for row in evaluations] == [10, 20, 30, 40, 50, 60]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] < 5.6
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"validation loss {evaluations[-1]['val_loss']:.4f}" in out
    assert f" sample {run}" in out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--precision", "bfloat16"],
        ["--precision", "float16"],
        ["--optimizer", "muon"],
        ["--dropout", 0.2, "--embedding-dropout", 0.1, "--attention-dropout", 0.2],
    ],
    ids=str,
)
def test_a_resumed_run_has_bitwise_the_weights_of_an_unbroken_one(words, tiny, tritium, tmp_path):
    assert tritium(*tiny, *words)[0] == 0
    run, broken = tmp_path / "run", tmp_path / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "step-20")
    assert tritium("train", "--resume", broken)[0] == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (folder / "checkpoints" / "step-20" / name for folder in (run, broken))
        assert a.read_bytes() == b.read_bytes()
    rows, evaluations = read_metrics(broken)
    assert [row["step"] for row in rows] == list(range(20))
    assert [(row["step"], row["val_loss"]) for row in evaluations] == [
        (row["step"], row["val_loss"]) for row in read_metrics(run)[1]
    ]


def test_resuming_a_finished_run_evaluates_it(tiny, tritium, tmp_path):
    assert tritium(*tiny)[0] == 0
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    lines = before.pop(run / "metrics.jsonl").splitlines()
    status, out, err = tritium("train", "--resume", tmp_path / "run")
    assert status == 0
    assert "validation loss" in out
    assert "all 20 steps were already done; to train longer, give --change steps=N" in err
    assert before == {path: path.read_bytes() for path in before}
    assert sorted(lines) == sorted((run / "metrics.jsonl").read_bytes().splitlines())
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_compiled_run_evaluates_samples_and_resumes(tiny, tritium, tmp_path, monkeypatch):
    """With a backend that generates no code, which would take longer than this run."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert tritium(*tiny, "--out", tmp_path / "plain")[0] == 0
    status, _, err = tritium(*tiny, "--compile", "on")
    assert status == 0, err
    assert "\ncompiling the model: the first step takes longer" in err
    run, plain = tmp_path / "run", tmp_path / "plain"
    losses = [[row["val_loss"] for row in read_metrics(folder)[1]] for folder in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (run / "samples.txt").read_text().count("--- step") == 2
    before = weights(run)
    shutil.rmtree(run / "checkpoints" / "step-20")
    assert tritium("train", "--resume", run)[0] == 0
    assert weights(run) == before
    assert tritium("sample", run, "--seed", 1)[0] == 0


def test_equal_seeds_give_equal_weights(tiny, tritium, tmp_path):
    assert tritium(*tiny)[0] == 0
    assert tritium(*tiny, "--out", tmp_path / "again")[0] == 0
    assert tritium(*tiny, "--out", tmp_path / "other", "--seed", 7)[0] == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "again") != weights(tmp_path / "other")


def test_the_document_mask_changes_training_and_is_kept_by_a_resume(tiny, tritium, tmp_path):
    texts, masked = tmp_path / "texts", tmp_path / "masked"
    texts.mkdir()
    for number in range(200):
        (texts / f"{number}.txt").write_text(f"text {number} ends", encoding="utf-8")
    tiny = [*tiny, "--data", texts]
    assert tritium(*tiny)[0] == 0
    assert tritium(*tiny, "--out", masked, "--document-mask")[0] == 0
    assert json.loads((masked / "config.json").read_text())["train"]["document_mask"] is True
    assert weights(masked) != weights(tmp_path / "run")
    before = weights(masked)
    shutil.rmtree(masked / "checkpoints" / "step-20")
    assert tritium("train", "--resume", masked)[0] == 0
    assert weights(masked) == before


def test_a_run_uses_the_attention_option_and_a_resume_keeps_it(
    tiny, tritium, error_of, tmp_path, monkeypatch
):
    assert tritium(*tiny)[0] == 0
    used = []
    functions = attention.SDPA
    noted = replace(
        functions,
        attend=lambda *arguments: (
            used.append(torch.is_grad_enabled()) or functions.attend(*arguments)
        ),
    )
    monkeypatch.setattr(attention, "SDPA", noted)
    sdpa = tmp_path / "sdpa"
    assert tritium(*tiny, "--out", sdpa, "--attention", "sdpa")[0] == 0
    assert set(used) == {True, False}, "in training and in evaluations"
    losses = [
        [row["loss"] for row in read_metrics(folder)[0]] for folder in (tmp_path / "run", sdpa)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    used.clear()
    before = weights(sdpa)
    shutil.rmtree(sdpa / "checkpoints" / "step-20")
    assert tritium("train", "--resume", sdpa)[0] == 0
    assert weights(sdpa) == before
    assert used
    assert tritium("sample", sdpa, "--seed", 1)[0] == 0
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "--attention: expected an installed flash-attn" in error_of(
        *tiny, "--out", tmp_path / "flash", "--attention", "flash-attn"
    )
    assert not (tmp_path / "flash").exists()


def stopped_after(calls: int, name: str, monkeypatch) -> None:
    """Send a signal after `calls` calls of `name`, a function or method of the loop."""
    owner = session.CheckpointSaver if name == "save" else session
    original, count = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(count) == calls:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("learning_rate", 7),
        pytest.param("learning_rate", 10, marks=pytest.mark.slow),
        pytest.param("_evaluate", 1, marks=pytest.mark.slow),
        ("_evaluate", 2),
        ("save", 3),
    ],
)
def test_a_stopped_and_resumed_run_ends_like_an_unbroken_one(
    name, calls, tiny, tritium, tmp_path, monkeypatch
):
    """Stop in a step, before or in an evaluation, in the last evaluation or last checkpoint."""
    assert tritium(*tiny)[0] == 0
    run, broken = tmp_path / "run", tmp_path / "broken"
    stopped_after(calls, name, monkeypatch)
    assert tritium(*tiny, "--out", broken)[0] == 143
    monkeypatch.undo()
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    assert tritium("train", "--resume", broken)[0] == 0
    assert weights(run) == weights(broken)
    (rows, evaluations), (broken_rows, broken_evaluations) = read_metrics(run), read_metrics(broken)
    assert [(row["step"], row["loss"]) for row in rows] == [
        (row["step"], row["loss"]) for row in broken_rows
    ]
    assert evaluations == broken_evaluations
    assert (
        (broken / "samples.txt")
        .read_text()
        .endswith((run / "samples.txt").read_text().split("--- step 20")[-1])
    )


def test_divergence_is_reported_in_one_line(tiny, error_of):
    assert "training diverged: lower --lr" in error_of(
        *tiny, "--lr", "1e9", "--grad-clip", 0, "--warmup-steps", 0
    )


def test_two_runs_do_not_share_a_folder(tiny, error_of, tmp_path, monkeypatch):
    """The other run takes it while this run prepares its data."""
    original = pretrain._prepare_dataset

    def late(*arguments, **options):
        (tmp_path / "run").mkdir()
        locks.append(FolderLock(tmp_path / "run"))
        return original(*arguments, **options)

    locks = []
    monkeypatch.setattr(pretrain, "_prepare_dataset", late)
    assert "expected a folder that no other process writes, but process" in error_of(*tiny)
    locks[0].release()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("limit", "file"), [(10_000, "train-00000.bin"), (30_000, "model.safetensors")]
)
def test_a_full_disk_is_reported_in_one_line_and_leaves_no_files(
    limit, file, tiny, tritium, tmp_path
):
    """A limit on the size of files makes a write fail in the middle, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status, _, err = tritium(*tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2, err
    *progress, line = err.splitlines()
    assert line.startswith("tritium: ")
    assert line.endswith(f"{file}: File too large")
    # The number of epochs is told before the first file of the run is written.
    assert len(progress) == (file == "model.safetensors")
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_interrupted_first_checkpoint_leaves_no_run(tiny, tritium, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.CheckpointSaver, "save", interrupt)
    assert tritium(*tiny)[0] == 130
    assert not (tmp_path / "run").exists()
