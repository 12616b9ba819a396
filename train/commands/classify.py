"""tritium classify: print the label of each line of text."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...errors import InputError
from ..choices import PRECISIONS
from .cli import parse

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
    tokenizer: str | None = None
    """Tokenizer, if the model has none: bytes, gpt2, FILE.tiktoken, FILE.json or FOLDER."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ... auto: CUDA if there is a GPU, else the CPU."""
    precision: Literal[tuple(PRECISIONS)] = "auto"
    """Dtype of matmuls. auto: float32 on a CPU, bfloat16 on CUDA, float16 on GPUs without it."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"batch_size: expected 1 or more, got {self.batch_size}")


def main(argv: Sequence[str]) -> int:
    """Run `tritium classify`."""
    options = parse(ClassifyOptions, argv, prog="tritium classify", description=_DESCRIPTION)
    # The help is printed by now. The import of PyTorch takes seconds.
    from ..finetune.classify_batch import classify_texts
    from ..machine.device import choose_device, choose_matmul
    from ..machine.threads import limit_threads
    from ..precision import choose_dtype, working_copy
    from ..run.models import open_model

    device = choose_device(options.device)
    limit_threads()
    choose_matmul(device)
    trained = open_model(Path(options.model))
    tokenizer = trained.tokenizer(options.tokenizer)
    model = trained.load_classifier().float().to(device)
    model = working_copy(model, choose_dtype(options.precision, device)).eval()
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
