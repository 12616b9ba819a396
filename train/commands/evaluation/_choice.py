"""tritium eval choice: which of several texts follows a context best."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ....errors import check_positive, plural
from ...eval.choice_formats import FORMATS, read_examples
from ...storage.files import hash_file
from ...terminal.console import loading
from ...terminal.progress import progress
from ..cli import parse
from ._options import EvaluationOptions

_DESCRIPTION = """Choose texts that follow contexts: HellaSwag, LAMBADA, or a file of your own.


FILE has one JSON object per line, in the published format of HellaSwag or LAMBADA, or with the keys context, choices and label."""  # noqa: E501 - --help keeps line breaks


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions(EvaluationOptions):
    """Options of `tritium eval choice`."""

    file: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE")]]
    """A jsonl file."""
    task: Literal[("auto", *FORMATS)] = "auto"
    """The format. auto: the first one that has the keys of the first line."""
    limit: int | None = None
    """Use only so many examples, the first ones. None: all."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "limit")


def main(argv: Sequence[str]) -> int:
    """Run `tritium eval choice`."""
    options = parse(ChoiceOptions, argv, prog="tritium eval choice", description=_DESCRIPTION)
    with loading():
        from ...eval.choice import encode_examples, measure_choices

    path = Path(options.file)
    task, examples = read_examples(path, options.task)
    examples = examples[: options.limit]
    model = options.open()
    encoded = encode_examples(examples, model.needed_tokenizer(), model.gpt.config.context_tokens)
    with progress(path.name, sum(len(choices) for _, choices in encoded)) as report:
        found = measure_choices(
            model.gpt, task, examples, encoded, batch_size=options.batch_size, report=report
        )
    print(f"{path}: {plural(len(examples), 'example')} of the task {task}")
    for name, value in found.items():
        print(f"  {name:24} {value:.4f}")
    results = {
        "path": str(path.resolve()),
        "sha256": hash_file(path),
        "task": task,
        "examples": len(examples),
        **found,
    }
    options.write(model, "choice", list(argv), results)
    return 0
