"""tritium classify: print the label of each line of text."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ....errors import InputError, check_positive
from ...machine.options import OpenOptions
from ..cli import parse

_DESCRIPTION = """Print the most likely label, and its probability, for each line of the input.


tritium classify runs/classify-1 < lines.txt"""


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """Options of `tritium classify`."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run of `tritium finetune classify`, its checkpoint, or its export."""
    json: bool = False
    """Print an object per line, with the probabilities of all labels."""
    batch_size: int = 8
    """Lines per forward. It changes results only by rounding."""
    opening: tyro.conf.OmitArgPrefixes[OpenOptions]

    def __post_init__(self):
        check_positive(self, "batch_size")


def main(argv: Sequence[str]) -> int:
    """Run `tritium classify`."""
    options = parse(ClassifyOptions, argv, prog="tritium classify", description=_DESCRIPTION)
    # The help is printed by now. The import of PyTorch takes seconds.
    from ...eval.model import OpenedModel
    from ...finetune.classify_batch import classify_texts

    opened = OpenedModel.open(
        Path(options.model), options.opening, is_classifier=True, needs_tokenizer=True
    )
    model = opened.gpt
    tokenizer = opened.needed_tokenizer()
    describe = _as_json if options.json else _as_text
    count = 0
    for probabilities in classify_texts(model, tokenizer, _lines(), options.batch_size):
        print(describe(model.labels, probabilities), flush=True)
        count += 1
    if not count:
        raise InputError("classify: expected a text per line on the standard input, got none")
    return 0


def _lines() -> Iterator[str]:
    """Yield the lines of the standard input, without their ends."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input:{number}: expected UTF-8 text, got {error}") from None


def _as_text(labels: Sequence[str], probabilities: Sequence[float]) -> str:
    best = max(probabilities)
    return f"{labels[probabilities.index(best)]}\t{best:.4f}"


def _as_json(labels: Sequence[str], probabilities: Sequence[float]) -> str:
    best = max(probabilities)
    record = {
        "label": labels[probabilities.index(best)],
        "probability": best,
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }
    return json.dumps(record, ensure_ascii=False)
