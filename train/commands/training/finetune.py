"""tritium finetune: train a model further, on records for a task."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Annotated, Any

import tyro

from ....errors import InputError
from ...config import ExecutionOptions, ReportOptions, TrainConfig
from ...finetune.start import (
    FIXED_OPTIONS,
    default_config,
    finetune_config,
    finetune_tasks,
)
from ...machine.options import Launch
from ...tasks import TASKS
from ...terminal.console import loading
from ..cli import parse
from .train import ModelFlags, TrainFlags, is_given
from .train import main as train

_HELP = """Fine-tune a model on records for a task.

  tritium finetune TASK MODEL --data FILE [--key value ...]
  tritium finetune TASK --help                    the options of a task
  tritium finetune --resume RUN_DIR               continue a stopped run

MODEL is a run, a checkpoint or a Hugging Face folder. Tasks:

"""
_DESCRIPTION = """{summary}.


tritium finetune {task} MODEL --data FILE [--key value ...]


MODEL is a run, a checkpoint or a Hugging Face folder. The new run has its shape and tokenizer. FILE
has the records. By default a run makes 3 epochs and evaluates after each. The warm-up is at most a
tenth of the steps. Commands such as sample, chat, export and --resume work with the new run."""
# tyro parses the file of each class, in search of help texts. Classes of make_dataclass would have
# the longer types.py of the standard library.
_NAMESPACE = {"__module__": __name__}


def _without_fixed(options: type) -> type:
    """Return a subclass of a dataclass in which FIXED_OPTIONS are no flags."""
    types = {each.name: each.type for each in fields(options) if each.name in FIXED_OPTIONS}
    found = [
        (name, tyro.conf.Suppress[tyro.conf.Fixed[type_]], field()) for name, type_ in types.items()
    ]
    return make_dataclass(
        options.__name__,
        found,
        bases=(options,),
        namespace=_NAMESPACE,
        frozen=True,
        kw_only=True,
    )


_ModelFlags = _without_fixed(ModelFlags)
_ReportFlags = _without_fixed(ReportOptions)


@dataclass(frozen=True, kw_only=True)
class FinetuneFlags(_without_fixed(TrainFlags)):
    """TrainConfig as flat flags, without those that follow from the model."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")]
    """File of records, such as jsonl. docs/finetuning.md describes them."""
    tokenizer: str | None = None
    """For a model that came without one: gpt2, FILE.tiktoken, FILE.json, FOLDER or bytes."""
    seed: int = TrainConfig.seed
    """Seed of the splits, the order of the records and dropout."""
    steps: int = TrainConfig.steps
    """Optimizer steps, instead of `epochs`."""
    model: tyro.conf.OmitArgPrefixes[_ModelFlags]
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions]
    report: tyro.conf.OmitArgPrefixes[_ReportFlags]


def main(argv: Sequence[str]) -> int:
    """Run `tritium finetune`."""
    if argv and argv[0].split("=")[0] == "--resume":
        return train(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP + "\n".join(f"  {name}: {TASKS[name].summary}" for name in finetune_tasks()))
        return 0
    task, *words = argv
    default = default_config(task)
    model = words.pop(0) if words and not words[0].startswith("-") else None
    options, launch = _parse(task, default, words)
    if model is None:
        raise InputError(
            f"finetune {task}: expected MODEL, a run, a checkpoint or a Hugging Face folder, "
            "got none"
        )
    if not is_given("--data", words):
        raise InputError("--data: expected a file of records, got none")
    data = options.pop("data")
    if len(data) != 1:
        raise InputError(f"--data: expected one file of records, got {' '.join(data)}")
    for name in ("steps", "epochs"):  # only the one that was given counts
        if not is_given(f"--{name}", words):
            options.pop(name)
    # The help is printed by now. The import of PyTorch takes seconds.
    with loading():
        from ._running import run_new

        config = finetune_config(task, model, data[0], **options)
    return run_new(task, config, launch)


def _parse(task: str, default: TrainConfig, words: Sequence[str]) -> tuple[dict[str, Any], Launch]:
    """Return the options by their flat names, and the launch."""
    task_options = tyro.conf.OmitArgPrefixes[TASKS[task].options]
    flags = make_dataclass(
        "TrainFlags",
        [("task_options", task_options)],
        bases=(FinetuneFlags,),
        namespace=_NAMESPACE,
        frozen=True,
        kw_only=True,
    )
    values = {name: getattr(default, name) for name in TrainConfig.__dataclass_fields__}
    values |= {
        "data": ("FILE",),
        "model": _ModelFlags(**asdict(default.model)),
        "report": _ReportFlags(**asdict(default.report)),
    }
    command = make_dataclass(
        "FinetuneOptions",
        [
            ("run", tyro.conf.OmitArgPrefixes[flags]),
            ("launch", tyro.conf.OmitArgPrefixes[Launch]),
        ],
        namespace=_NAMESPACE,
        frozen=True,
        kw_only=True,
    )
    description = _DESCRIPTION.format(
        task=task, summary=TASKS[task].summary[0].upper() + TASKS[task].summary[1:]
    )
    found = parse(
        command,
        words,
        prog=f"tritium finetune {task}",
        description=description,
        default=command(run=flags(**values), launch=Launch()),
    )
    options = found.run.options()
    return {
        name: value for name, value in options.items() if name not in FIXED_OPTIONS
    }, found.launch
