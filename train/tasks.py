"""The tasks that a run can train for, as rows of the table TASKS.

A task is a module with a function

    open_data(config, *, record=None, run=None, progress=False) -> TaskData

TaskData (finetune/data.py) is a base class. A task overrides what differs from pretraining: how
records become batches, which model is built, how held-out data is evaluated, what a sample is, and
what is written after the last step. loop.py is the only loop.

To add a task:

    1. Write a module, such as finetune/instruct.py, with `open_data` and a subclass of TaskData.
    2. Add a dataclass of its options here. The docstring of a field is its help text, in one line.
    3. Add the row:

        TASKS = {
            ...
            "instruct": Task(".finetune.instruct", InstructOptions, "answer instructions"),
        }

The row gives the option `task` its new value, `tritium finetune` a new subcommand with its options,
and config.json the options by their flat names. The names of options must differ from all others.

config.py reads the table, so this file does not import it.
"""

import importlib
import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from ..errors import InputError, unknown_name
from .generation.templates import TEMPLATES


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of one task. Pretraining has none."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TaskOptions):
    """Options of all tasks that train on records."""

    epochs: float | None = 3.0
    """Passes over the training records. None: `steps` counts."""
    evals_per_epoch: int = 1
    """Evaluations per epoch on the validation records. There is always one after the last step."""
    val_fraction: float = 0.05
    """Fraction of the records that is held out for validation. The seed chooses them."""
    test_fraction: float = 0.1
    """Fraction of the records that is held out for the test after training."""
    row_tokens: int | None = None
    """Maximum number of tokens per sequence. None: the context of the model."""

    def __post_init__(self):
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"epochs: expected more than 0, and finite, got {self.epochs}")
        if self.evals_per_epoch < 1:
            raise InputError(f"evals_per_epoch: expected at least 1, got {self.evals_per_epoch}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(
                "val_fraction: expected less than 1 together with the `test_fraction` "
                f"{self.test_fraction}, got {self.val_fraction}"
            )
        if self.row_tokens is not None and self.row_tokens < 2:
            raise InputError(f"row_tokens: expected at least 2, got {self.row_tokens}")


@dataclass(frozen=True, kw_only=True)
class InstructOptions(FinetuneOptions):
    """Options of the task instruct."""

    template: Literal[("auto", "model", *TEMPLATES)] = "auto"
    """Text around messages. model: its chat template. auto: this template, else plain."""
    packing: bool = True
    """Put several records into a row. They do not attend to each other."""
    answer_tokens: int = 256
    """Maximum number of tokens of an answer to a test record."""

    def __post_init__(self):
        super().__post_init__()
        if self.answer_tokens < 1:
            raise InputError(f"answer_tokens: expected at least 1, got {self.answer_tokens}")


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(FinetuneOptions):
    """Options of the task "classify"."""

    text_column: str = "text"
    """Column of tsv and csv files, by name or number, or key of json objects, with the text."""
    label_column: str = "label"
    """Column of tsv and csv files, by name or number, or key of json objects, with the label."""
    balance: bool = False
    """Keep equally many texts of each label, as many as the rarest label has."""
    class_weights: bool = False
    """Weigh losses inversely to the frequency of their label in the training part."""
    trained_blocks: int | None = None
    """Train only the last so many blocks, the final norm and the head. 0: the head. None: all."""
    val_fraction: float = 0.1
    """Fraction of the texts that is held out for validation. The seed chooses them."""
    test_fraction: float = 0.2
    """Fraction of the texts that is held out for the test after training."""


@dataclass(frozen=True, kw_only=True)
class PreferOptions(FinetuneOptions):
    """Options of the task prefer."""

    template: Literal[("auto", "model", *TEMPLATES)] = "auto"
    """Text around prompts and answers. model: its chat template. auto: this, else plain."""
    beta: float = 0.1
    """Scale of rewards. With smaller values the model can move further from its first weights."""
    label_smoothing: float = 0.0
    """Probability that chosen and rejected answers are swapped in the records."""
    length_normalize: bool = False
    """Divide the log-probability of an answer by its number of tokens."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise InputError(f"beta: expected a number above 0, and finite, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(
                f"label_smoothing: expected a number in [0, 0.5), got {self.label_smoothing}"
            )


# Defaults of tasks that start from a trained model.
_FINETUNE = {
    "batch_size": 8,
    "lr": 5e-5,
    "min_lr": 0.0,
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "beta2": 0.999,
}


@dataclass(frozen=True)
class Task:
    """A row of TASKS."""

    module: str
    """Module with `open_data`, relative to this folder. It is imported when a run needs it."""
    options: type[TaskOptions]
    summary: str
    """A summary of the task, for --help."""
    has_documents: bool = False
    """Whether batches can have a varying number of packed documents. CUDA graphs need one shape."""
    next_command: str = "chat"
    """Command of tritium that uses the trained model, for a hint after training."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Options whose defaults differ from those of TrainConfig."""

    @property
    def code(self) -> ModuleType:
        """The module of the task."""
        return importlib.import_module(self.module, __package__)


TASKS: dict[str, Task] = {
    "pretrain": Task(".pretrain", TaskOptions, "predict the next token of text"),
    "instruct": Task(
        ".finetune.instruct",
        InstructOptions,
        "answer instructions and questions",
        has_documents=True,
        defaults=_FINETUNE,
    ),
    "classify": Task(
        ".finetune.classify",
        ClassifyOptions,
        "give a text one of several labels",
        has_documents=True,
        next_command="classify",
        defaults=_FINETUNE,
    ),
    "prefer": Task(
        ".finetune.prefer",
        PreferOptions,
        "prefer one answer to another (DPO)",
        defaults=_FINETUNE | {"lr": 5e-6},
    ),
}


def task_named(name: str) -> Task:
    """Return a row. Raises: InputError that suggests the nearest names."""
    if name not in TASKS:
        raise InputError(unknown_name("task", name, TASKS))
    return TASKS[name]
