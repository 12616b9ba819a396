"""Open a trained model, wherever it comes from.

RUN                        a run: its newest checkpoint
RUN/checkpoints/step-N     one checkpoint
FOLDER                     a folder of transformers (GPT-2, Llama)
FILE                       a checkpoint file of nanoGPT
"""

from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...model import GPT, GPTConfig
from ...model.weights import open_source
from ..data.tokenizer import Tokenizer
from .checkpoint import load_weights, newest_checkpoint
from .folder import read_run

# The tokenizer in a folder that `tritium export` wrote. tokenizer.json is transformers' there.
EXPORTED_TOKENIZER = "tritium_tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model on the disk, and what is known about it."""

    path: Path
    config: GPTConfig
    tokenizer_file: Path | None
    """None: the model came without a tokenizer that tritium reads."""
    run: Path | None = None
    """Folder of the run that trained it. None: the model is not from a run."""
    checkpoint: Path | None = None
    """Folder of the run's checkpoint."""

    def load(self, *, attention: str = "tritium", recompute: str = "none") -> GPT:
        """Read the weights. Returns: the model, on the CPU."""
        if self.checkpoint is None:
            return GPT.from_pretrained(self.path, attention=attention, recompute=recompute)
        model = GPT(self.config, attention=attention, recompute=recompute)
        load_weights(self.checkpoint, model)
        return model

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer. Raises: InputError if there is none."""
        if self.tokenizer_file is None:
            raise InputError(
                f"{self.path}: expected the tokenizer of a run or of `tritium export`, found none; "
                "tritium does not read other tokenizers"
            )
        return Tokenizer.load(self.tokenizer_file)


def open_model(path: Path) -> SavedModel:
    """Find a trained model. Its weights are not read yet.

    Raises: InputError if there is no model at `path`.
    """
    is_checkpoint = path.parent.name == "checkpoints" and (path / "state.json").exists()
    run = path.parent.parent if is_checkpoint else path
    if not is_checkpoint and not (path / "checkpoints").is_dir() and _is_published(path):
        file = path / EXPORTED_TOKENIZER
        return SavedModel(
            path=path,
            config=open_source(path).config,
            tokenizer_file=file if file.is_file() else None,
        )
    return SavedModel(
        path=path,
        config=read_run(run).model,
        tokenizer_file=run / "tokenizer.json",
        run=run,
        checkpoint=path if is_checkpoint else newest_checkpoint(run),
    )


def _is_published(path: Path) -> bool:
    """Whether the path is a file, or a folder whose config.json names a model of transformers."""
    config = path / "config.json"
    return path.is_file() or (config.is_file() and b'"model_type"' in config.read_bytes())
