"""The configuration of a new run that fine-tunes a model: `tritium finetune` and api.py use it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...errors import InputError, unknown_name
from ...model import GPTConfig
from ...model.config import OPTIONS_OF_RUN
from ..config import TrainConfig
from ..storage.records import check_types
from ..tasks import TASKS

# Options that follow from the model, the records and the epochs.
FIXED_OPTIONS = (
    *("task", "held_out", "text_field", "init_from", "document_mask"),
    *("eval_interval", "eval_tokens", "prompt"),
    *(each.name for each in fields(GPTConfig) if each.name not in OPTIONS_OF_RUN),
)


def finetune_tasks() -> list[str]:
    """Return the names of the tasks that start from a trained model."""
    return [name for name in TASKS if name != "pretrain"]


def with_prefix(shape: GPTConfig, tokens: int) -> GPTConfig:
    """Return the shape of a trained model with the prefix of a new run.

    Raises: InputError if the model has a prefix, or no room for one.
    """
    if shape.prefix_tokens:
        raise InputError(
            f"init_from: expected a model without prefix tuning, got {shape.prefix_tokens} prefix "
            "tokens; start from the model that the prefix belongs to"
        )
    try:
        return shape.with_prefix(tokens)
    except ValueError as error:
        raise InputError(str(error).removeprefix("GPTConfig: ")) from None


def shape_for_run(trained: GPTConfig, options: GPTConfig) -> GPTConfig:
    """Return the shape of a trained model with the dropout and the prefix of a new run.

    Raises: InputError as `with_prefix`.
    """
    return with_prefix(trained.with_dropout_of(options), options.prefix_tokens)


def default_config(task: str) -> TrainConfig:
    """Return the default options of a task.

    Raises: InputError for an unknown task.
    """
    if task not in finetune_tasks():
        raise InputError(unknown_name("task", task, finetune_tasks()))
    return TrainConfig.from_options(task=task, **TASKS[task].defaults)


def finetune_config(task: str, model: str | Path, data: str | Path, **options: Any) -> TrainConfig:
    """Return the options of a run that fine-tunes a model.

    Args:
        task: a row of TASKS.
        model: a run, a checkpoint or a Hugging Face folder.
        data: file of records.
        options: of TrainConfig and of the task, by their flat names. With `steps` and without
            `epochs`, the steps count.
    Raises: InputError if the model or an option is wrong.
    """
    from ..run.models import open_model, recorded_path

    for name in options:
        if name in FIXED_OPTIONS:
            raise InputError(
                f"{name}: expected no value, because it follows from the model or the task, got "
                f"{options[name]!r}"
            )
    if "steps" in options and "epochs" in options and options["epochs"] is not None:
        raise InputError("steps: expected none with `epochs`, got both; leave one out")
    if "steps" in options:
        options["epochs"] = None
    default = default_config(task)
    check_types(options, TASKS[task].options)
    init_from = recorded_path(model)
    config = default.with_options(init_from=init_from, data=(str(data),), **options)
    return replace(config, model=shape_for_run(open_model(Path(model)).config, config.model))
