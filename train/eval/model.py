"""Open a trained model on a device, and describe it, so that an evaluation can be repeated."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...kernels.core.triton import HAS_TRITON, triton
from ...model import GPT
from ..data.tokenizers.tokenizer import Tokenizer
from ..machine.device import choose_device, choose_matmul
from ..machine.options import OpenOptions
from ..machine.threads import limit_threads
from ..precision import choose_dtype, working_copy
from ..run.models import SavedModel, open_model
from ..storage.files import hash_file

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model on its device, in evaluation mode, and where it came from."""

    saved: SavedModel
    gpt: GPT
    tokenizer: Tokenizer | None
    """None: the model came without one, and none was named."""
    device: torch.device
    dtype: torch.dtype
    """Dtype of matmuls."""

    @classmethod
    def open(
        cls,
        path: Path,
        options: OpenOptions,
        *,
        is_classifier: bool = False,
        needs_tokenizer: bool = False,
    ) -> "OpenedModel":
        """Read a model.

        Args:
            path: a run, a checkpoint, a Hugging Face folder, ...: see `open_model`.
            options: the tokenizer, the device and the precision.
            is_classifier: whether to read a GPTClassifier instead of a language model.
            needs_tokenizer: whether to raise before the weights are read if there is no tokenizer.
        Raises: InputError if the path is no model, or one of another type, or if the tokenizer or
            the device does not fit.
        """
        device = choose_device(options.device)
        limit_threads()
        choose_matmul(device)
        saved = open_model(path)
        has_tokenizer = options.tokenizer is not None or saved.tokenizer_path is not None
        reads_tokenizer = has_tokenizer or needs_tokenizer
        tokenizer = saved.tokenizer(options.tokenizer) if reads_tokenizer else None
        dtype = choose_dtype(options.precision, device)
        model = saved.load_classifier() if is_classifier else saved.load()
        return cls(
            saved=saved,
            tokenizer=tokenizer,
            gpt=working_copy(model.float().to(device), dtype).eval(),
            device=device,
            dtype=dtype,
        )

    def needed_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises: InputError if there is none."""
        return self.saved.tokenizer() if self.tokenizer is None else self.tokenizer

    def record(self) -> dict[str, Any]:
        """Return what identifies the model and the machine, for a JSON file."""
        folder = self.saved.checkpoint or self.saved.path
        files = [folder] if folder.is_file() else sorted(folder.iterdir())
        if self.saved.adapter is not None:
            files += sorted(self.saved.adapter.iterdir())
        weights = [
            file
            for file in files
            if file.suffix in _WEIGHT_SUFFIXES and not file.name.startswith("optimizer")
        ]
        device = self.device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(self.device)
        return {
            "model": {
                "path": str(folder.resolve()),
                "sha256": {file.name: hash_file(file) for file in weights},
            },
            "tokenizer": None
            if self.tokenizer is None
            else {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
            "precision": str(self.dtype).removeprefix("torch."),
            "device": device,
            "versions": {
                "tritium": __version__,
                "torch": torch.__version__,
                "triton": triton.__version__ if HAS_TRITON else None,
                "python": platform.python_version(),
            },
        }
