"""Open a trained model, wherever it comes from.

RUN                        a run: its newest checkpoint
RUN/checkpoints/step-N     one checkpoint
FOLDER                     a folder of transformers (GPT-2, Llama)
FILE                       a checkpoint file of nanoGPT
"""

from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...model import GPT
from ..data.tokenizer import Tokenizer
from .checkpoint import load_weights, newest_checkpoint
from .folder import RunRecord, read_run

# The tokenizer in a folder that `tritium export` wrote. tokenizer.json is transformers' there.
EXPORTED_TOKENIZER = "tritium_tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model on the CPU, and what is known about it."""

    path: Path
    model: GPT
    tokenizer: Tokenizer | None
    """None: the model came without a tokenizer that tritium reads."""
    run: Path | None = None
    """Folder of the run that trained it."""
    record: RunRecord | None = None
    """Content of the run's config.json."""
    steps: int | None = None
    """Optimizer steps of the checkpoint."""

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises: InputError if there is none."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.path}: expected a tokenizer that tritium reads, found none; "
                "`tritium export` writes one"
            )
        return self.tokenizer


def open_model(path: Path) -> TrainedModel:
    """Read a trained model.

    Raises: InputError if there is no model at `path`, or if a file is damaged.
    """
    is_checkpoint = path.parent.name == "checkpoints" and (path / "state.json").exists()
    run = path.parent.parent if is_checkpoint else path
    if not is_checkpoint and not (path / "checkpoints").is_dir() and _is_published(path):
        file = path / EXPORTED_TOKENIZER
        tokenizer = Tokenizer.load(file) if file.is_file() else None
        return TrainedModel(path=path, model=GPT.from_pretrained(path), tokenizer=tokenizer)
    record = read_run(run)
    model = GPT(record.model)
    steps = load_weights(path if is_checkpoint else newest_checkpoint(run), model)
    return TrainedModel(
        path=path,
        model=model,
        tokenizer=Tokenizer.load(run / "tokenizer.json"),
        run=run,
        record=record,
        steps=steps,
    )


def _is_published(path: Path) -> bool:
    """Whether the path is a file, or a folder whose config.json names a model of transformers."""
    config = path / "config.json"
    return path.is_file() or (config.is_file() and b'"model_type"' in config.read_bytes())
