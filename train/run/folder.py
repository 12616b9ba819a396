"""The folder of a run: config.json, the dataset that it names, and who may write.

    format_version      of config.json
    tritium             version of this package when the run began; also python and torch
    train               the options, by their flat names
    model               the shape of the model
    dataset             absolute path of the dataset folder, or of the file of records
    dataset_relative    the same path relative to the run folder
    tokens              training and validation tokens of the dataset, or rows of records
    data_sha256         hash of the file of records; null for a dataset
    labels              the labels of a classifier; missing for other models
    tokenizer_sha256    hash of the dataset's tokenizer
    execution           device, precision, ranks, ... that the run uses: Execution.summary()
    history             what changed when the run was resumed: see history.py
    sha256              checksum of all the above; older runs have none

A missing option takes its default, so older runs stay loadable. An unknown one is an error.

One process at a time writes the folder (storage/lock.py). A process that is killed before the first
checkpoint leaves a folder without results. The next process takes it over.
"""

import contextlib
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...errors import InputError, check_utf8
from ...model import GPTConfig
from ..config import OPTION_CLASSES, TrainConfig
from ..data.dataset import SPLITS, Dataset, open_dataset
from ..data.prepare import prepare_for
from ..distributed.world import World
from ..storage.files import check_can_create, seal, unseal, write_whole
from ..storage.lock import LOCK_FILE, FolderLock
from ..storage.records import check_names, check_types, parse_object
from ..tasks import task_named
from .checkpoint import checkpoints


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
    execution: dict | None = None
    """None: an older run did not record it."""
    history: list = field(default_factory=list)
    data_sha256: str | None = None
    """Hash of the file of records. None: a dataset, which has checksums of its own."""
    labels: list[str] = field(default_factory=list)
    """The labels of a classifier. Empty for other models."""


FORMAT_VERSION = 1
# Keys of config.json that are not fields of a RunRecord.
_OTHER_KEYS = ("tritium", "python", "torch", "format_version", "sha256")
# All that a run has written before its first checkpoint.
_FIRST_FILES = ("config.json", "tokenizer.json", "checkpoints", LOCK_FILE)
# A run that lost one of them cannot be resumed, or has no results.
_NEEDED = ("config.json", "metrics.jsonl")
# All that a run writes. A link would lead the writes out of the folder.
_WRITTEN = (
    *_FIRST_FILES,
    *("metrics.jsonl", "samples.txt", "loss.png", "profile", "tensorboard", "wandb", "wandb-id"),
    # the results of tasks
    *("answers.jsonl", "reference.json", "margins.jsonl"),
    *("test.json", "predictions.jsonl", "confusion.png"),
)


@contextlib.contextmanager
def only_writer(run: Path, world: World) -> Iterator[Callable[[], None]]:
    """Keep other processes from writing `run`, inside the context. All ranks must call it.

    Creates the folder if there is none, and deletes the temporary files of killed processes.

    Yields: a function that raises InputError if the folder, or a file that the run needs, was moved
        or deleted in the meantime. All ranks must call it. Call it before writing, after
        metrics.jsonl exists.
    Raises: InputError if another process writes the folder, or if it holds links or pipes.
    """
    locks: list[FolderLock] = []  # empty on all ranks but rank 0

    def take() -> None:
        run.mkdir(parents=True, exist_ok=True)
        locks.append(FolderLock(run))
        if problem := locks[0].problem:
            print(
                f"{run}: {problem}, so it is not locked; do not start a second process on it",
                file=sys.stderr,
            )
        for path in (run / name for name in _WRITTEN):
            is_plain = path.is_file() or path.is_dir() or not path.exists()
            if path.is_symlink() or not is_plain:
                found = "a link" if path.is_symlink() else "a device or a pipe"
                raise InputError(
                    f"{path}: expected a file or folder of the run, got {found}; replace it by a "
                    "copy (the folder of the run itself can be a link)"
                )
        for file in run.glob(".*.tmp"):
            if not file.is_dir():
                file.unlink()

    def check() -> None:
        locks[0].check()
        for file in (run / name for name in _NEEDED):
            if not file.is_file():
                raise InputError(
                    f"{file}: expected the file that this process wrote, found none: it was moved "
                    "or deleted in the meantime; put it back, then resume the run"
                )

    try:
        world.on_rank0(take)
        yield lambda: world.on_rank0(check)
    finally:
        for lock in locks:
            lock.release()


def is_unstarted(run: Path) -> bool:
    """Return whether the folder only holds what a run writes before its first checkpoint."""
    config = run / "config.json"
    if config.is_file() and not _is_own_config(config):
        return False
    files = [path for path in run.iterdir() if not _is_temporary(path)]
    if any(path.name not in _FIRST_FILES or path.is_symlink() for path in files):
        return False
    if (run / "tokenizer.json").exists() and not config.exists():
        return False
    folder = run / "checkpoints"
    return not folder.exists() or all(map(_is_temporary, folder.iterdir()))


def _is_own_config(file: Path) -> bool:
    """Whether a run wrote the file. Older versions left an empty file when the disk was full."""
    content = file.read_bytes()
    return not content or b'"tritium"' in content


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def check_folder_unused(run: Path) -> None:
    """Raise InputError unless `run` can be created, is empty, or has no checkpoint yet.

    Its path must be UTF-8.
    """
    check_utf8(run)
    check_can_create(run)
    if run.exists() and not is_unstarted(run):
        what, hint = "holds other files", "choose another `out`"
        if (run / "config.json").exists():
            what, hint = "is a run already", "choose another `out`, or `resume` it"
        elif checkpoints(run):
            what = "has the checkpoints of a run without config.json"
            hint = "put config.json back, or choose another `out`"
        raise InputError(f"{run}: expected a new or empty folder, this one {what}; {hint}")


def create_free_folder(name: str) -> Path:
    """Create runs/NAME-1, or the next that is free. Two processes never get the same folder."""
    for number in itertools.count(1):
        path = Path("runs") / f"{name}-{number}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def remove_unused_folder(run: Path) -> None:
    """Remove a folder of `create_free_folder` if no run started in it, and runs/ if it is empty."""
    with contextlib.suppress(OSError):  # it is not empty
        run.rmdir()
        run.parent.rmdir()


def claim_folder(
    run: Path,
    config: TrainConfig,
    model: GPTConfig,
    dataset: Dataset,
    execution: dict | None = None,
) -> None:
    """Write config.json and tokenizer.json. The process must be the only writer of `run`.

    `model` is the shape of the model. It can have more tokens than the tokenizer. `dataset` is a
    Dataset, or the TaskData of a run.

    Raises: InputError as check_folder_unused.
    """
    check_folder_unused(run)
    record = {
        "format_version": FORMAT_VERSION,
        "tritium": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "train": config.options(),
        "model": asdict(model),
        **record_dataset(run, dataset),
        "tokenizer_sha256": dataset.tokenizer.sha256,
        "execution": execution,
        "history": [],
    }
    write_whole(run / "config.json", [seal(record)])
    dataset.tokenizer.save(run / "tokenizer.json")


def record_dataset(run: Path, dataset: Dataset) -> dict[str, Any]:
    """Return the fields of config.json about a Dataset, or about the TaskData of a run."""
    folder = dataset.path.resolve()
    labels = list(getattr(dataset, "labels", ()))
    return {
        "dataset": str(folder),
        "dataset_relative": _relative(folder, run.resolve()),
        "tokens": _tokens(dataset),
        "data_sha256": getattr(dataset, "sha256", None),
        **({"labels": labels} if labels else {}),
    }


def update_record(run: Path, **fields: Any) -> None:
    """Replace fields of config.json. The process must be the only writer of `run`."""
    file = run / "config.json"
    record = parse_object(file.read_bytes())
    record.pop("sha256", None)
    write_whole(file, [seal(record | fields)])


def read_run(run: Path) -> RunRecord:
    """Read config.json.

    Raises: InputError if the folder is not a run, or if config.json is not as tritium wrote it.
    """
    file = run / "config.json"
    if not file.is_file():
        hint = "put it back" if checkpoints(run) else "`tritium train` makes one"
        raise InputError(
            f"{run}: expected the folder of a run (with config.json), found none; {hint}"
        )
    content = file.read_bytes()
    if not content and checkpoints(run):
        raise InputError(
            f"{file}: expected the options of the run, got an empty file; put a copy of it back: "
            "the checkpoints cannot be read without it"
        )
    if not content:
        raise InputError(
            f"{file}: expected options, got an empty file: the run stopped before its first "
            "checkpoint; start it again with the same command"
        )
    try:
        return _parse_record(content)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{file}: expected what `tritium train` wrote there, got something else ({error})"
        ) from None


def _parse_record(content: bytes) -> RunRecord:
    """Raises: InputError or another exception if the content is not a record."""
    record = parse_object(content)
    if "sha256" in record:
        try:
            unseal(content)
        except ValueError as error:
            raise InputError(
                f"{error}: it was edited or damaged; undo the change, or start a new run with the "
                "options that you want"
            ) from None
    version = record.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(
            f"expected format_version {FORMAT_VERSION}, got {version!r}; use the version of "
            "tritium that wrote it"
        )
    check_names("field", record, [*_OTHER_KEYS, *_field_names(RunRecord)])
    check_names("model option", record["model"], _field_names(GPTConfig))
    options = record["train"]
    task = task_named(options.get("task", "pretrain"))
    for part in (*OPTION_CLASSES, task.options):
        check_types(options, part)
    check_types(record["model"], GPTConfig)
    found = {name: record[name] for name in _field_names(RunRecord) if name in record}
    for name, value in options.items():
        if isinstance(value, list):
            options[name] = tuple(value)
    found["train"] = TrainConfig.from_options(**options)
    found["model"] = GPTConfig(**record["model"])
    expected = asdict(found["train"].gpt(found["model"].vocab_size))
    for name, value in asdict(found["model"]).items():
        if value != expected[name]:
            raise InputError(f"{name}: expected {expected[name]} as in `train`, got {value}")
    found["dataset"] = Path(record["dataset"])
    check_types(found, RunRecord)
    tokens = found.get("tokens")
    if tokens is not None and set(tokens) != set(SPLITS):
        raise InputError(f"tokens: expected those of {' and '.join(SPLITS)}, got {tokens}")
    return RunRecord(**found)


def open_recorded_dataset(record: RunRecord, run: Path, *, progress: bool = True) -> Dataset:
    """Open the dataset of a run, even if the run or the dataset was moved or the cache is gone.

    Tries the recorded path, the same path relative to the run folder, and the recorded name next to
    the run folder. If none is a dataset, builds it again from the recorded inputs.

    Raises: InputError if it is not found and cannot be built, or if it is another dataset.
    """
    found = [path for path in recorded_paths(record, run) if (path / "dataset.json").is_file()]
    path = found[0] if found else _build_again(record, run, progress)
    dataset = open_dataset(path)
    check_tokenizer(dataset, record, run)
    if record.tokens is not None and record.tokens != _tokens(dataset):
        raise InputError(
            f"{path}: expected {_describe(record.tokens)} as {run} was trained on, got "
            f"{_describe(_tokens(dataset))}; build the dataset as it was, or start a new run"
        )
    return dataset


def recorded_paths(record: RunRecord, run: Path) -> list[Path]:
    """Return where the data of a run can be, even if the run or the data was moved."""
    folder = run.resolve()
    paths = [record.dataset]
    if record.dataset_relative is not None:
        paths.append(folder / record.dataset_relative)
    return [*paths, folder.parent / record.dataset.name]


def check_tokenizer(dataset: Dataset, record: RunRecord, run: Path) -> None:
    """Raise InputError if the dataset has another tokenizer than the run."""
    if dataset.tokenizer.sha256 != record.tokenizer_sha256:
        raise InputError(
            f"{dataset.path}: expected tokenizer {record.tokenizer_sha256[:12]}, with which {run} "
            f"was trained, got {dataset.tokenizer.sha256[:12]}; build the dataset as it was, or "
            "start a new run"
        )


def _build_again(record: RunRecord, run: Path, progress: bool) -> Path:
    config = record.train
    if progress:
        print(
            f"{record.dataset}: not found; building the dataset of {run} again from "
            f"{' '.join(config.data)}",
            file=sys.stderr,
        )
    try:
        return prepare_for(config, progress=progress)
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
