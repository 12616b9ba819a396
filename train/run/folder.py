"""The folder of a run: config.json, and the dataset that it names.

    train               the options, by their flat names
    model               the shape of the model
    dataset             absolute path of the dataset folder
    dataset_relative    the same path relative to the run folder
    tokens              training and validation tokens of the dataset
    tokenizer_sha256    hash of the dataset's tokenizer

A missing option takes its default, so older runs stay loadable. An unknown one is an error.
"""

import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...errors import InputError, unknown_name
from ...model import GPTConfig
from ..config import TrainConfig
from ..data.dataset import Dataset, open_dataset
from ..data.prepare import cache_dir, prepare
from ..files import write_whole


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of config.json: all that is needed to repeat or resume a run."""

    train: TrainConfig
    model: GPTConfig
    dataset: Path
    tokenizer_sha256: str
    dataset_relative: str | None = None
    """None: an older run did not record it."""
    tokens: dict[str, int] | None = None
    """None: an older run did not record them."""


# Keys of config.json that nothing reads.
_PROVENANCE = ("tritium", "python", "torch")


def check_folder_unused(run: Path) -> None:
    """Raise InputError unless `run` is new or an empty folder."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        what = "a run already" if (run / "config.json").exists() else "in use"
        raise InputError(
            f"{run}: expected a new or empty folder, this one is {what}; choose another `out`, "
            "or --resume it"
        )


def claim_folder(run: Path, config: TrainConfig, model: GPTConfig, dataset: Dataset) -> None:
    """Create `run`, config.json and tokenizer.json. If several processes try, one succeeds.

    `model` is the shape of the model. It can have more tokens than the tokenizer.

    Raises: InputError as check_folder_unused.
    """
    run.mkdir(parents=True, exist_ok=True)
    check_folder_unused(run)
    folder = dataset.path.resolve()
    record = {
        "tritium": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "train": config.options(),
        "model": asdict(model),
        "dataset": str(folder),
        "dataset_relative": _relative(folder, run.resolve()),
        "tokens": _tokens(dataset),
        "tokenizer_sha256": dataset.tokenizer.sha256,
    }
    try:
        open(run / "config.json", "x").close()
    except FileExistsError:
        check_folder_unused(run)
    write_whole(run / "config.json", [json.dumps(record, indent=2).encode() + b"\n"])
    dataset.tokenizer.save(run / "tokenizer.json")


def read_run(run: Path) -> RunRecord:
    """Read config.json.

    Raises: InputError if the folder is not a run, or tritium did not write the file.
    """
    file = run / "config.json"
    if not file.is_file():
        raise InputError(
            f"{run}: expected the folder of a run (with config.json), found none; "
            "`tritium train` makes one"
        )
    try:
        content = json.loads(file.read_bytes())
        _check_names("field", content, [*_PROVENANCE, *_field_names(RunRecord)])
        _check_names("model option", content["model"], _field_names(GPTConfig))
        options = content["train"]
        if "data" in options:
            options["data"] = tuple(options["data"])
        return RunRecord(
            train=TrainConfig.from_options(**options),
            model=GPTConfig(**content["model"]),
            dataset=Path(content["dataset"]),
            tokenizer_sha256=str(content["tokenizer_sha256"]),
            dataset_relative=content.get("dataset_relative"),
            tokens=content.get("tokens"),
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: expected what `tritium train` wrote there, got something else ({error!r})"
        ) from None


def open_recorded_dataset(record: RunRecord, run: Path, *, progress: bool = True) -> Dataset:
    """Open the dataset of a run, even if the run or the dataset was moved or the cache is gone.

    Tries the recorded path, the same path relative to the run folder, and the recorded name next to
    the run folder. If none is a dataset, builds it again from the recorded inputs.

    Raises: InputError if it is not found and cannot be built, or if it is another dataset.
    """
    folder = run.resolve()
    candidates = [record.dataset]
    if record.dataset_relative is not None:
        candidates.append(folder / record.dataset_relative)
    candidates.append(folder.parent / record.dataset.name)
    found = [path for path in candidates if (path / "dataset.json").is_file()]
    path = found[0] if found else _build_again(record, run, progress)
    dataset = open_dataset(path)
    if dataset.tokenizer.sha256 != record.tokenizer_sha256:
        raise InputError(
            f"{path}: expected tokenizer {record.tokenizer_sha256[:12]}, with which {run} was "
            f"trained, got {dataset.tokenizer.sha256[:12]}; build the dataset as it was, or "
            "start a new run"
        )
    if record.tokens is not None and record.tokens != _tokens(dataset):
        raise InputError(
            f"{path}: expected {_describe(record.tokens)} as {run} was trained on, got "
            f"{_describe(_tokens(dataset))}; build the dataset as it was, or start a new run"
        )
    return dataset


def _build_again(record: RunRecord, run: Path, progress: bool) -> Path:
    config = record.train
    if progress:
        print(
            f"{record.dataset}: not found; building the dataset of {run} again from "
            f"{' '.join(config.data)}",
            file=sys.stderr,
        )
    try:
        return prepare(
            config.data,
            config.tokenizer,
            cache_dir() / "datasets",
            held_out=config.held_out,
            progress=progress,
        )
    except InputError as error:
        raise InputError(
            f"{record.dataset}: expected the dataset of {run}, found none, and it cannot be built "
            f"again ({error}); put it next to {run}, or start in the folder with the text"
        ) from None


def _relative(path: Path, start: Path) -> str | None:
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return None  # on another drive of Windows


def _tokens(dataset: Dataset) -> dict[str, int]:
    return {"train": len(dataset.train), "val": len(dataset.val)}


def _describe(tokens: dict[str, int]) -> str:
    return f"{tokens['train']:,} training and {tokens['val']:,} validation tokens"


def _field_names(dataclass_type: type) -> list[str]:
    return [each.name for each in fields(dataclass_type)]


def _check_names(kind: str, given: dict[str, Any], known: Iterable[str]) -> None:
    """Raise InputError for a name that is not known."""
    for name in given:
        if name not in known:
            raise InputError(unknown_name(kind, name, known))
