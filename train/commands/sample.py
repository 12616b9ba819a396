"""tritium sample: write text with a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...errors import InputError
from ..device import choose_device, choose_matmul
from ..loop import sample_text
from ..precision import PRECISIONS, choose_dtype, working_copy
from ..run.models import open_model
from .cli import parse


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of `tritium sample`."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run, whose newest checkpoint is used, a checkpoint, or a folder of `tritium export`."""
    prompt: str = ""
    """Text to continue. Empty: the start of a document."""
    temperature: float = 0.8
    """Divides the logits. 0: always the most likely token."""
    top_k: int | None = None
    """Sample from the k most likely tokens. None: from all."""
    top_p: float | None = 0.95
    """Sample from the most likely tokens that have this probability in total. None: from all."""
    max_new_tokens: int = 200
    """Largest number of tokens to write."""
    seed: int | None = None
    """The same seed gives the same text. None: different text each time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ... auto: CUDA if there is a GPU, else the CPU."""
    precision: Literal[tuple(PRECISIONS)] = "auto"
    """Dtype of matmuls. auto: float32 on a CPU, bfloat16 on CUDA, float16 on GPUs without it."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium sample`."""
    options = parse(
        SampleOptions, argv, prog="tritium sample", description="Write text with a trained model."
    )
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise InputError(f"seed: expected a number from 0 to 2**63 - 1, got {options.seed}")

    device = choose_device(options.device)
    choose_matmul(device)
    trained = open_model(Path(options.model))
    tokenizer = trained.tokenizer()
    model = trained.load().float().to(device)
    model = working_copy(model, choose_dtype(options.precision, device))
    try:
        text = sample_text(
            model,
            tokenizer,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    print(text)
    return 0
