"""Both trackers, with fake packages that record calls. Nothing here uses a network."""

import json
import shutil
import sys
import types

import pytest

from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain


@pytest.fixture
def calls(monkeypatch) -> list:
    """The calls of wandb and of TensorBoard's writer, in order."""
    recorded = []

    class Recorder:
        def __init__(self, called, /, *args, **kwargs):
            recorded.append((called, args, kwargs))

        def __getattr__(self, name):
            return lambda *args, **kwargs: recorded.append((name, args, kwargs))

    modules = {
        "wandb": {"init": lambda **kwargs: Recorder("init", **kwargs), "Error": RuntimeError},
        "tensorboard": {},
        "torch.utils.tensorboard": {
            "SummaryWriter": lambda *args, **kwargs: Recorder("SummaryWriter", *args, **kwargs)
        },
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name, origin="fake")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return recorded


def expected(run) -> list[dict]:
    """The lines of training and of evaluations in metrics.jsonl, without null values."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "goodput" not in line]
    return [{name: value for name, value in line.items() if value is not None} for line in lines]


def test_wandb_receives_each_line_and_a_resumed_run_goes_on(calls, tiny, tritium, tmp_path):
    run = tmp_path / "run"
    assert tritium(*tiny, "--wandb", "fox")[0] == 0
    (name, _, first), *logged, last = calls
    assert (name, first["project"], first["name"], first["dir"]) == ("init", "fox", "run", str(run))
    assert first["config"]["d_model"] == 16
    assert [kwargs | args[0] for _, args, kwargs in logged] == expected(run)
    assert last[0] == "finish"
    calls.clear()
    shutil.rmtree(run / "checkpoints" / "step-20")
    assert tritium("train", "--resume", run)[0] == 0
    (_, _, again), *logged, _ = calls
    assert (again["id"], again["resume"]) == (first["id"], "allow")
    assert [kwargs["step"] for _, _, kwargs in logged] == list(range(10, 21))


def test_tensorboard_receives_each_number_and_drops_repeated_steps(calls, tiny, tritium, tmp_path):
    run = tmp_path / "run"
    assert tritium(*tiny, "--tensorboard")[0] == 0
    opened, *added, closed = calls
    assert opened == ("SummaryWriter", (str(run / "tensorboard"),), {"purge_step": 0})
    assert closed[0] == "close"
    numbers = [
        (name, value, line["step"])
        for line in expected(run)
        for name, value in line.items()
        if name != "step"
    ]
    assert [args for _, args, _ in added] == numbers
    calls.clear()
    shutil.rmtree(run / "checkpoints" / "step-20")
    assert tritium("train", "--resume", run)[0] == 0
    assert calls[0][2] == {"purge_step": 10}


def test_tensorboard_writes_losses_that_it_can_read(tiny, tritium, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert tritium(*tiny, "--tensorboard")[0] == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")[0]]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


@pytest.mark.parametrize(
    "option", [["--wandb", "fox"], ["--tensorboard"]], ids=lambda words: words[0]
)
def test_missing_package_is_one_line_and_makes_no_run(
    option, tiny, error_of, tmp_path, monkeypatch
):
    name = option[0].removeprefix("--")
    monkeypatch.setitem(sys.modules, name, None)
    line = error_of(*tiny, *option)
    assert (
        f"{option[0]}: expected an installed {name}, found none; pip install 'tritium[log]'" in line
    )
    assert not (tmp_path / "run").exists()


def test_wandb_error_is_one_line_and_the_run_can_be_resumed(
    calls, tiny, tritium, error_of, tmp_path, monkeypatch
):
    def init(**kwargs):
        raise RuntimeError("no API key configured")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["wandb"], "init", init)
        line = error_of(*tiny, "--wandb", "fox")
    assert (
        "--wandb: expected to open a run in fox, got no API key configured; use `wandb login`"
        in line
    )
    assert tritium("train", "--resume", tmp_path / "run")[0] == 0
    assert calls[0][0] == "init"
