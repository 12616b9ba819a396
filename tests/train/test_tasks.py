import json
from dataclasses import dataclass, fields

import pytest

from tritium.errors import InputError
from tritium.model import GPTConfig
from tritium.train.config import ExecutionOptions, ReportOptions, TrainConfig
from tritium.train.finetune.start import finetune_tasks
from tritium.train.run.folder import read_run
from tritium.train.tasks import (
    TASKS,
    FinetuneOptions,
    Task,
    TaskOptions,
    task_named,
)

pytestmark = pytest.mark.plain


@dataclass(frozen=True, kw_only=True)
class CountOptions(FinetuneOptions):
    count_to: int = 10
    """Largest number."""


@pytest.fixture
def count(monkeypatch):
    """A task with an option, without its module."""
    monkeypatch.setitem(TASKS, "count", Task(".count", CountOptions, "count"))
    from tritium.train import config

    for each in fields(CountOptions):
        monkeypatch.setitem(config.PART_OF, each.name, lambda config: config.task_options)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_has_data_and_options_with_names_of_their_own(name):
    assert issubclass(TASKS[name].options, TaskOptions)
    assert callable(TASKS[name].code.open_data)
    parts = (TrainConfig, GPTConfig, ExecutionOptions, ReportOptions)
    others = {each.name for part in parts for each in fields(part)}
    assert not others & {each.name for each in fields(TASKS[name].options)}


def test_the_options_of_a_task_are_options_of_its_runs_only(count):
    config = TrainConfig.from_options(task="count", count_to=3, epochs=2, lr=1e-4)
    assert config.task_options == CountOptions(count_to=3, epochs=2)
    assert config.options()["count_to"] == 3
    assert TrainConfig.from_options(**config.options()) == config
    assert config.with_options(count_to=4).task_options.epochs == 2
    assert "count_to" not in TrainConfig().options()
    with pytest.raises(InputError, match="unknown option 'count_to'"):
        TrainConfig.from_options(count_to=3)
    with pytest.raises(InputError, match="unknown task 'cuont'; did you mean 'count'"):
        TrainConfig.from_options(task="cuont")
    with pytest.raises(ValueError, match="task_options must be CountOptions for the task count"):
        TrainConfig(task="count")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected more than 0, and finite, got 0"),
        ({"evals_per_epoch": 0}, "evals_per_epoch: expected at least 1, got 0"),
        ({"val_fraction": -1}, r"val_fraction: expected a number in \[0, 1\), got -1"),
        ({"test_fraction": 0.96}, "val_fraction: expected less than 1 together with"),
        ({"row_tokens": 1}, "row_tokens: expected at least 2, got 1"),
    ],
)
def test_values_out_of_range_raise(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        FinetuneOptions(**options)
    for task in finetune_tasks():
        with pytest.raises(InputError, match=f"^{message}"):
            TrainConfig.from_options(task=task, **options)


def test_unknown_tasks_suggest_the_nearest():
    with pytest.raises(InputError, match="unknown task 'pretrian'; did you mean 'pretrain'"):
        task_named("pretrian")


def test_the_run_of_an_older_version_pretrains(tiny, tritium, tmp_path):
    """Its config.json has no task."""
    assert tritium(*tiny, "--steps", 1)[0] == 0
    file = tmp_path / "run" / "config.json"
    record = json.loads(file.read_text())
    assert record["train"].pop("task") == "pretrain"
    record.pop("sha256")
    file.write_text(json.dumps(record))
    assert read_run(tmp_path / "run").train.task == "pretrain"
    record["train"]["task"] = "guess"
    file.write_text(json.dumps(record))
    with pytest.raises(InputError, match="unknown task 'guess'"):
        read_run(tmp_path / "run")
