"""The folder of a run: what config.json says of it, and claiming a folder for a new one."""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ... import __version__
from ...errors import InputError
from ...model import GPTConfig
from ..config import TrainConfig
from ..data.dataset import Dataset
from ..files import write_whole


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """config.json: all that is needed to repeat or resume a run.

    train: its options.   model: the shape that follows.   dataset: folder.   tokenizer_sha256: of the dataset's tokenizer.
    """

    train: TrainConfig
    model: GPTConfig
    dataset: Path
    tokenizer_sha256: str


def check_folder_unused(run: Path) -> None:
    """Raise InputError unless `run` is new or an empty folder."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        what = "a run already" if (run / "config.json").exists() else "in use"
        raise InputError(
            f"{run}: expected a new or empty folder, this one is {what}; choose another --out, or --resume it"
        )


def claim_folder(run: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Make `run` and write its config.json and tokenizer.json; of several processes that try, one succeeds.

    Raises: InputError as check_folder_unused.
    """
    run.mkdir(parents=True, exist_ok=True)
    check_folder_unused(run)
    record = {
        "tritium": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "train": config.options(),
        "model": asdict(config.gpt(dataset.tokenizer.vocab_size)),
        "dataset": str(dataset.path.resolve()),
        "tokenizer_sha256": dataset.tokenizer.sha256,
    }
    try:
        open(run / "config.json", "x").close()
    except FileExistsError:
        check_folder_unused(run)
    write_whole(run / "config.json", [json.dumps(record, indent=2).encode() + b"\n"])
    dataset.tokenizer.save(run / "tokenizer.json")


def read_run(run: Path) -> RunRecord:
    """Read config.json. Raises: InputError if the folder is no run or the file is not one that tritium wrote."""
    file = run / "config.json"
    if not file.is_file():
        raise InputError(
            f"{run}: expected the folder of a run (with config.json), found none; `tritium train` makes one"
        )
    try:
        content = json.loads(file.read_bytes())
        options = content["train"]
        return RunRecord(
            train=TrainConfig.from_options(**options | {"data": tuple(options["data"])}),
            model=GPTConfig(**content["model"]),
            dataset=Path(content["dataset"]),
            tokenizer_sha256=str(content["tokenizer_sha256"]),
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: expected what `tritium train` wrote there, got something else ({error!r})"
        ) from None
