"""Changes of a run when it is resumed, and their history in config.json.

    FREE           options of the execution and the report: may change at each resume
    CHANGEABLE     options that change the result: may change if the user names them as a change
    other options  never change

config.json always has the current options. Its list `history` has one entry for each resume that
changed something:

    {"step": 500, "time": "2026-11-26 10:44:08", "changes": {"lr": [0.001, 0.0001]}}

Each change is [old value, new value]. `ranks`, `parallel`, `shard_ranks` and `tensor_parallel` are
those of the launch. `device`, `precision`, `compile` and `micro_batch_size` are the values that
"auto" stands for.
"""

import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...errors import InputError, unknown_name
from ..config import PART_OF, ExecutionOptions, ReportOptions, TrainConfig
from ..data.dataset import Dataset
from ..data.prepare import is_dataset
from ..data.tokenizers.tokenizer import needs_corpus
from ..execution import Execution
from ..schedule import check_learning_rates
from .folder import RunRecord, record_dataset, update_record

CHANGEABLE = (
    "data",
    "steps",
    "lr",
    "min_lr",
    "warmup_steps",
    "schedule",
    "weight_decay",
    "beta1",
    "beta2",
    "grad_clip",
    "skip_threshold",
    "max_bad_steps",
)
# Their values change at most the rounding. `out` is not one: a resumed run stays in its folder.
FREE = tuple(
    each.name
    for part in (ExecutionOptions, ReportOptions)
    for each in fields(part)
    if each.name != "out"
)


def check_changeable(name: str) -> None:
    """Raise InputError unless `name` is an option that changes the result and can change."""
    if name not in PART_OF:
        raise InputError(unknown_name("change", name, CHANGEABLE))
    if name not in CHANGEABLE:
        raise InputError(
            f"{name}: a resumed run keeps its value; the options that can change are "
            f"{', '.join(CHANGEABLE)}"
        )


def changes_between(run: Path, recorded: TrainConfig, given: TrainConfig) -> dict[str, Any]:
    """Return the changes with which a run continues when its command is given again.

    Raises: InputError, which names the option, if the command would give another result.
    """
    before = recorded.options()
    changes = {}
    for name, value in given.options().items():
        if value == before[name] or name == "out":
            continue
        if name not in FREE:
            raise InputError(
                f"{name}: expected {_spell(before[name])}, as {run} has it, got {_spell(value)}; "
                "give the recorded value, or choose another `out`"
            )
        changes[name] = value
    return changes


def with_changes(run: Path, recorded: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return the options with which a run continues.

    Raises: InputError for a name that cannot change, and for values that do not fit.
    """
    for name in changes:
        if name not in FREE:
            check_changeable(name)
    config = recorded.with_options(**changes)
    if {"lr", "min_lr", "schedule"} & changes.keys():
        check_learning_rates(config)
    if "data" not in changes:
        return config
    # The new data must have the tokens that the model knows.
    tokenizer = config.tokenizer
    if is_dataset(config.data):
        tokenizer = None
    elif tokenizer is None or needs_corpus(tokenizer):
        tokenizer = str((run / "tokenizer.json").resolve())
    return config.with_options(tokenizer=tokenizer)


def note_resume(
    run: Path,
    record: RunRecord,
    config: TrainConfig,
    dataset: Dataset,
    execution: Execution,
    step: int,
) -> None:
    """Write the options of a resumed run to config.json, and print what changed.

    Args:
        record: config.json as it was.
        config: the options with which the run continues.
        dataset: a Dataset, or the TaskData of the run.
        step: number of optimizer steps done.
    Raises: InputError if the run is beyond the new number of steps.
    """
    if config.steps < step:
        raise InputError(
            f"steps: expected at least {step}, which {run} has done, got {config.steps}"
        )
    changes = _changes(record.train.options(), config.options())
    if record.execution is None:
        update_record(run, execution=execution.summary())  # a run of an older version
    else:
        # The values after "auto" can differ although the options are equal.
        changes |= _changes(record.execution, execution.summary())
    if not changes:
        return
    entry = {"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S"), "changes": changes}
    update_record(
        run,
        train=config.options(),
        execution=execution.summary(),
        history=[*record.history, entry],
        **record_dataset(run, dataset),
    )
    lines = ", ".join(f"{name} {_spell(a)} -> {_spell(b)}" for name, (a, b) in changes.items())
    print(f"{run}: from step {step} on: {lines}", file=sys.stderr)


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list]:
    return {
        name: [before.get(name), value]
        for name, value in after.items()
        if value != before.get(name) and name != "tokenizer"
    }


def _spell(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
