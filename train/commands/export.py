"""tritium export: write a trained model as a folder that transformers opens."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ...model.cost import parameters
from ...model.weights import write_folder
from ..data.transformers_tokenizer import save_for_transformers
from ..run.folder import read_run
from ..run.metrics import read_metrics
from ..run.models import EXPORTED_TOKENIZER, SavedModel, open_model
from .cli import parse

# Files of tokenizers in folders of transformers. They are copied as they are.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `tritium export`."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run, a checkpoint, a folder of transformers, or a checkpoint file of nanoGPT."""
    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT_DIR")]]
    """New folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in the folder. auto: as they are, so that no bit changes."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium export`."""
    options = parse(
        ExportOptions,
        argv,
        prog="tritium export",
        description="Write a trained model as a folder that transformers opens.",
    )
    out = Path(options.out)
    trained = open_model(Path(options.model))
    tokenizer = trained.tokenizer() if trained.tokenizer_file else None
    model = trained.load()
    if options.dtype != "auto":
        model.to(getattr(torch, options.dtype))

    def add_files(folder: Path) -> None:
        if tokenizer:
            save_for_transformers(tokenizer, folder, model.config.context_tokens)
            tokenizer.save(folder / EXPORTED_TOKENIZER)
        elif trained.path.is_dir():
            for name in _TOKENIZER_FILES:
                if (trained.path / name).is_file():
                    shutil.copyfile(trained.path / name, folder / name)
        (folder / "README.md").write_text(_model_card(trained), encoding="utf-8")

    write_folder(
        out,
        model.state_dict(),
        model.config,
        end_of_text=tokenizer.end_of_text if tokenizer else None,
        add_files=add_files,
    )
    print(f"{out}: open it with AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


def _model_card(trained: SavedModel) -> str:
    """Return a README for the folder: what the model is, and how it was trained."""
    config = trained.config
    name = (trained.run or trained.path).resolve().name
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {name}",
        "",
        f"A language model with {parameters(config):,} parameters: {config.n_layer} blocks of "
        f"width {config.d_model}, {config.vocab_size:,} tokens, a context of "
        f"{config.context_tokens:,} tokens.",
        "",
    ]
    if trained.run is None:
        return "\n".join([*lines, f"Converted from {trained.path.name} by tritium.", ""])
    train = read_run(trained.run).train
    steps = int(trained.checkpoint.name.removeprefix("step-"))
    evaluations = [row for row in read_metrics(trained.run)[1] if row["step"] == steps]
    lines += [
        "Trained by tritium.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {', '.join(train.data)} |",
        f"| tokenizer | {trained.tokenizer().name} |",
        f"| steps | {steps:,} of {train.steps:,} |",
        f"| tokens per step | {train.batch_size * config.context_tokens:,} |",
        *(f"| validation loss | {row['val_loss']:.4f} nats per token |" for row in evaluations),
        "",
    ]
    return "\n".join(lines)
