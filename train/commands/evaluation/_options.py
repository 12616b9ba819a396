"""Options, progress and JSON files that the commands of `tritium eval` share."""

import json
import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ....errors import InputError, check_positive
from ...machine.options import OpenOptions
from ...storage.files import write_whole
from ...terminal.progress import progress

if TYPE_CHECKING:
    from ...eval.model import OpenedModel


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of all commands of `tritium eval`."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run (its newest checkpoint), a checkpoint, a Hugging Face folder or a GGUF file."""
    batch_size: int = 8
    """Sequences per forward. It changes results only by rounding."""
    opening: tyro.conf.OmitArgPrefixes[OpenOptions]
    json: str | None = None
    """File for the results and all that is needed to repeat them: checksums, options, versions."""

    def __post_init__(self):
        check_positive(self, "batch_size")
        if self.json is not None:
            _check_writable(Path(self.json))

    def open(self) -> "OpenedModel":
        """Read the model."""
        # Imported here because the import of PyTorch takes seconds.
        from ...eval.model import OpenedModel

        with progress("opening the model"):
            return OpenedModel.open(Path(self.model), self.opening)

    def write(self, model: "OpenedModel", command: str, argv: list[str], results: Any) -> None:
        """Write the JSON file, if one is asked for."""
        if self.json is None:
            return
        options = asdict(self)
        options |= options.pop("opening")
        record = {
            "command": shlex.join(["tritium", "eval", command, *argv]),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "options": options,
            **model.record(),
            "results": results,
        }
        write_whole(self.json, [json.dumps(record, indent=2).encode(), b"\n"])


def _check_writable(path: Path) -> None:
    """Raise InputError if the file cannot be written. An evaluation can take hours."""
    if path.is_dir() or not path.parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise InputError(f"json: expected a file in a folder that exists, got {path}: {found}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"json: expected a folder that can be written, got {path.parent}")
