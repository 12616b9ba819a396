"""tritium export: write a trained model as a folder that transformers opens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..cli import parse


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `tritium export`."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run, a checkpoint, a Hugging Face folder, a GGUF file, or a checkpoint of nanoGPT."""
    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT_DIR")]]
    """New folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in the folder. auto: as they are, so that no bit changes."""
    adapter: bool = False
    """Write only the LoRA or the prefix of a run, as a folder that PEFT opens."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium export`."""
    options = parse(
        ExportOptions,
        argv,
        prog="tritium export",
        description="Write a trained model as a folder that transformers opens.",
    )
    from ...run.models import open_model
    from ._model_folder import model_card, write_adapter, write_model

    trained = open_model(Path(options.model))
    if options.adapter:
        write_adapter(trained, Path(options.out), dtype=options.dtype)
        print(f"{options.out}: open it with PeftModel.from_pretrained(model, {options.out!r})")
        return 0
    write_model(trained, Path(options.out), model_card(trained), dtype=options.dtype)
    name = "AutoModelForSequenceClassification" if trained.labels else "AutoModelForCausalLM"
    print(f"{options.out}: open it with {name}.from_pretrained({options.out!r})")
    return 0
