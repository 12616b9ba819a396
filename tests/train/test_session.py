"""Bad steps in runs: each run is compared with one that leaves the same steps out."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from tritium.errors import plural
from tritium.train import evaluate, session
from tritium.train.run.metrics import read_metrics
from tritium.train.run.signals import Signals
from tritium.train.trainer import Trainer

pytestmark = pytest.mark.plain


@pytest.fixture
def inject(monkeypatch):
    """Change the loss or a gradient of some steps: inject({7}, "loss", nan)."""
    original = Trainer.backward

    def install(steps, where, value):
        def backward(self, batch, num_targets=None, *, step=0):
            loss = original(self, batch, num_targets, step=step)
            if step in steps and where == "loss":
                self._loss = loss = torch.full_like(loss, value)
                for parameter in self.model.parameters():
                    parameter.grad.fill_(value)
            elif step in steps:
                self.model.wte.weight.grad[0, 0] = value
            return loss

        monkeypatch.setattr(Trainer, "backward", backward)

    return install


@pytest.fixture
def leave_out(monkeypatch):
    """Let a run neither see nor use the data of some steps: leave_out({7})."""

    def install(steps):
        backward, update = Trainer.backward, Trainer.update

        def no_backward(self, batch, num_targets=None, *, step=0):
            self.step = step
            if step in steps:
                return torch.zeros(())
            return backward(self, batch, num_targets, step=step)

        def no_update(self, lr):
            return torch.zeros(()) if self.step in steps else update(self, lr)

        monkeypatch.setattr(Trainer, "backward", no_backward)
        monkeypatch.setattr(Trainer, "update", no_update)

    return install


def state(run, step=20) -> tuple[bytes, bytes]:
    folder = run / "checkpoints" / f"step-{step}"
    return tuple((folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer"))


NAN = torch.nan


@pytest.mark.parametrize(
    ("words", "where", "value", "steps"),
    [
        ([], "loss", NAN, {0, 7, 9, 19}),
        pytest.param([], "gradient", NAN, {7}, marks=pytest.mark.slow),
        pytest.param([], "gradient", torch.inf, {9}, marks=pytest.mark.slow),
        pytest.param(["--optimizer", "muon"], "loss", NAN, {0, 9}, marks=pytest.mark.slow),
        (["--optimizer", "muon"], "gradient", NAN, {9}),
        (["--precision", "float16"], "loss", NAN, {7, 9}),
        pytest.param(
            *(["--precision", "float16", "--optimizer", "muon"], "loss", NAN, {9}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_run_with_bad_steps_ends_like_a_run_that_never_saw_them(
    words, where, value, steps, tiny, tritium, inject, leave_out, tmp_path, monkeypatch
):
    """Steps 9 and 19 are the last before a checkpoint."""
    with monkeypatch.context():
        inject(steps, where, value)
        status, out, err = tritium(*tiny, *words, "--out", tmp_path / "bad")
        assert status == 0, err
        monkeypatch.undo()
    assert f"{plural(len(steps), 'step')} skipped" in out
    rows, _ = read_metrics(tmp_path / "bad")
    assert {row["step"] for row in rows if row["skipped"]} == steps
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(session, "plot_loss", lambda run: None)
    leave_out(steps)
    assert tritium(*tiny, *words, "--out", tmp_path / "never")[0] == 0
    assert state(tmp_path / "bad") == state(tmp_path / "never")
    assert state(tmp_path / "bad", 10) == state(tmp_path / "never", 10)


def test_steps_that_stay_bad_go_back_once_and_leave_out_their_data(
    tiny, tritium, inject, leave_out, tmp_path, monkeypatch
):
    """Steps 12 to 19 are bad. The loop reads them after step 19 and goes back to step 10."""
    words = [*tiny, "--steps", 30]
    with monkeypatch.context():
        inject(set(range(12, 20)), "loss", NAN)
        status, _, err = tritium(*words, "--out", tmp_path / "bad")
        assert status == 0, err
        monkeypatch.undo()
    assert "step 20: 8 bad steps in a row; restored the checkpoint of step 10" in err
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(session, "plot_loss", lambda run: None)
    leave_out(set(range(10, 20)))
    assert tritium(*words, "--out", tmp_path / "never")[0] == 0
    for step in (20, 30):
        assert state(tmp_path / "bad", step) == state(tmp_path / "never", step)


def test_a_run_that_stays_bad_stops_and_goes_on_with_a_lower_learning_rate(
    tiny, tritium, error_of, inject, tmp_path, monkeypatch
):
    inject(set(range(12, 90)), "gradient", NAN)
    message = error_of(*tiny, "--steps", 90)
    assert "training diverged: lower --lr" in message
    assert "steps 20 to 29 were bad: loss" in message
    assert "gradient norm not finite" in message
    assert "had left out the data of steps 10 to 19 already" in message
    assert "the newest checkpoint is now that of step 10" in message
    assert f"--resume {tmp_path / 'run'} --change lr=0.0015" in message
    monkeypatch.undo()  # with this learning rate all steps are good
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    words = ("train", "--resume", tmp_path / "run", "--change", "lr=0.0015")
    status, out, err = tritium(*words, "--change", "steps=30")
    assert status == 0, err
    assert "from step 10 on: steps 90 -> 30, lr 0.003 -> 0.0015" in err
    assert "skipped" not in out


@pytest.mark.parametrize("interval", [10, 11])
def test_a_run_with_a_far_too_high_learning_rate_can_be_resumed_with_a_lower_one(
    interval, tiny, error_of, tritium, tmp_path
):
    """The first update makes finite weights that are of no use.

    With an interval of 11 a checkpoint has such weights.
    """
    words = [*tiny, "--checkpoint-interval", interval, "--keep-checkpoints", 2, "--steps", 60]
    assert "--change lr=0.01" in error_of(*words, "--lr", "1e30")
    run = tmp_path / "run"
    for folder in (run / "checkpoints").iterdir():
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        assert max(value.abs().max() for value in weights.values()) < 10
    status, out, err = tritium("train", "--resume", run, "--change", "lr=0.01")
    assert status == 0, err
    assert "; 9 steps skipped" in out  # steps 1 to 9, before the change


def test_no_checkpoint_has_weights_that_are_not_finite(
    tiny, error_of, inject, tmp_path, monkeypatch
):
    """The update after step 9 makes a weight infinite. The checkpoint is due right after it."""
    update = Trainer.update

    def infinite(self, lr):
        result = update(self, lr)
        self.count = getattr(self, "count", 0) + 1
        if self.count >= 10:
            self.model.wte.weight.data[0, 0] = torch.inf
        return result

    monkeypatch.setattr(Trainer, "update", infinite)
    message = error_of(*tiny, "--steps", 40)
    assert "steps 11 to 19 were bad" in message
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        assert all(value.isfinite().all() for value in tensors.values()), folder


def test_an_evaluation_that_a_signal_cut_short_is_not_recorded(
    tiny, tritium, tmp_path, monkeypatch
):
    """As on several ranks, where a signal does not interrupt the work."""
    original = evaluate.batch_loss
    calls = []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    words = [*tiny, "--steps", 2, "--eval-tokens", 640, "--micro-batch-size", 1]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "batch_loss", signalled)
        patch.setattr(Signals, "interruptible", lambda self, work, **_: work())
        assert tritium(*words)[0] == 143
    assert len(calls) == 1
    run = tmp_path / "run"
    assert not read_metrics(run)[1]
    assert tritium("train", "--resume", run)[0] == 0
    assert tritium(*words, "--out", tmp_path / "unbroken")[0] == 0
    losses = [read_metrics(folder)[1][-1]["val_loss"] for folder in (run, tmp_path / "unbroken")]
    assert losses[0] == losses[1]


def test_the_lines_of_a_checkpoint_are_on_the_disk_before_it(tiny, tritium, tmp_path, monkeypatch):
    """After a power cut a checkpoint without its lines would be of no use."""
    original = os.fsync
    flushed = []

    def fsync(file):
        status = os.fstat(file)
        flushed.append((status.st_ino, status.st_size))
        original(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert tritium(*tiny, "--steps", 2)[0] == 0
    run = tmp_path / "run"
    weights = (run / "checkpoints" / "step-2" / "model.safetensors").stat()
    before = flushed[: flushed.index((weights.st_ino, weights.st_size))]
    file = run / "metrics.jsonl"
    size = max(size for number, size in before if number == file.stat().st_ino)
    lines = file.read_bytes()[:size].splitlines()
    assert [json.loads(line)["step"] for line in lines if b"lr" in line] == [0, 1]


def test_the_progress_of_an_evaluation_counts_the_rows_of_all_ranks():
    trainer = SimpleNamespace(
        engine=SimpleNamespace(world=SimpleNamespace(data_ranks=4)), working=None
    )
    data = SimpleNamespace(evaluate=lambda model, batches, world: list(batches))
    signals = SimpleNamespace(received=None)
    rows = []
    session._evaluate(trainer, data, signals, [[0, 0], [0]], rows.append)
    assert rows == [8, 4]


def test_a_learning_rate_that_overflows_is_an_error_in_one_line(tiny, error_of):
    assert "training diverged: lower --lr" in error_of(*tiny, "--lr", "1e39", "--warmup-steps", 0)
