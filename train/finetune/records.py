"""Records of a file, their splits, and their batches.

    file        jsonl: one JSON object per line; or json: a list of objects
    splits      a permutation by the seed: test records, validation records, then training records
    position    p = step * batch_size + rank * (batch_size / world_size) + j    for row j of a rank
    row         permutation_e(p mod rows) of epoch e = p // rows

A batch depends on the step only, as in data/loader.py, so a resumed run continues with the next
batch. In each epoch every row is read exactly once.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, plural
from ..config import TrainConfig
from ..data.loader import permute, permuted_positions
from ..data.tokenizers.tokenizer import Tokenizer
from ..eval.jsonl import read_jsonl, read_utf8
from ..execution import Execution
from ..run.folder import RunRecord, recorded_paths
from ..run.models import open_model
from ..storage.files import hash_file
from ..storage.records import shorten
from .data import TaskBatch

# A record and where it is, for messages: FILE:LINE or FILE: record NUMBER.
Record = tuple[str, dict[str, Any]]


@contextlib.contextmanager
def errors_name(place: str) -> Iterator[None]:
    """Put the place of a record before the message of an InputError that is raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


# Smallest number of records: one to train on and one for validation.
_LEAST_RECORDS = 2


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """The file of a run's records, and the tokenizer of the run."""

    path: Path
    sha256: str
    records: list
    """The result of `read`. By default a list of Record."""
    tokenizer: Tokenizer


def open_records(
    config: TrainConfig,
    record: RunRecord | None,
    run: Path | None,
    read: Callable[[Path], list] | None = None,
) -> RecordFile:
    """Read the records and the tokenizer of a run.

    Args:
        record, run: config.json and the folder of a run that is resumed. None: a new run.
        read: returns the records of a file. Default: `read_records`.
    Raises: InputError if the file has other records than the run was started with.
    """
    if len(config.data) != 1:
        raise InputError(f"data: expected one file of records, got {' '.join(config.data)}")
    if config.init_from is None:
        raise InputError(f"init_from: expected a model for the task {config.task}, got none")
    path = Path(config.data[0])
    if record is None:
        tokenizer = open_model(Path(config.init_from)).tokenizer(config.tokenizer)
    else:
        tokenizer = open_model(run).tokenizer()
        if config.data == record.train.data:
            found = [each for each in recorded_paths(record, run) if each.is_file()]
            path = found[0] if found else path
    if not path.is_file():
        raise InputError(f"{path}: expected a file of records, found none")
    sha256 = hash_file(path)
    is_same_data = record is not None and config.data == record.train.data
    if is_same_data and record.data_sha256 not in (None, sha256):
        raise InputError(
            f"{path}: expected the records with which {run} was started, got other content; put "
            "the file back, or start a new run"
        )
    records = (read or read_records)(path)
    return RecordFile(path=path, sha256=sha256, records=records, tokenizer=tokenizer)


def read_records(path: Path) -> list[Record]:
    """Read a file of jsonl, or of one JSON list.

    Raises: InputError, which names the file and the line, if a part cannot be parsed, is not an
        object, or if the file is empty.
    """
    text = read_utf8(path)
    if not text.lstrip().startswith("["):
        return list(read_jsonl(path))
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: expected JSON, got {error.msg}") from None
    except ValueError as error:  # an integer with thousands of digits
        raise InputError(f"{path}: expected a list of records, got a number: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: expected a list of records, got one nested too deeply") from None
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise InputError(
                f"{path}: record {number}: expected a JSON object, got {shorten(item)}"
            )
    if not items:
        raise InputError(f"{path}: expected a list of records, got an empty list")
    return [(f"{path}: record {number}", item) for number, item in enumerate(items, 1)]


def split(
    count: int, *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose the records of each split.

    Args:
        count: number of records.
        val_fraction, test_fraction: of the records. At least one record is for validation.
    Returns: the indices for training, validation and test, each in ascending order.
    Raises: InputError if there is no record to train on.
    """
    val = max(1, round(count * val_fraction))
    test = round(count * test_fraction)
    if count < _LEAST_RECORDS or val + test >= count:
        hint = " or smaller `val_fraction` and `test_fraction`" if count >= _LEAST_RECORDS else ""
        raise InputError(
            f"data: expected at least {max(_LEAST_RECORDS, val + test + 1)} records, got {count}; "
            f"give more records{hint}"
        )
    order = permute(np.arange(count), count, seed, epoch=0)
    parts = order[test + val :], order[test : test + val], order[:test]
    return tuple(np.sort(part) for part in parts)


def fit_epochs(config: TrainConfig, rows: int) -> TrainConfig:
    """Return the configuration with the steps that `epochs` passes over `rows` rows take.

    The warm-up is then at most a tenth of the steps. There are `evals_per_epoch` evaluations in
    each epoch, rounded to steps. The number of steps is rounded likewise, so that the last epoch
    ends with an evaluation.
    """
    options = config.task_options
    epochs = options.epochs
    steps_per_epoch = rows / config.batch_size
    interval = max(1, round(steps_per_epoch / options.evals_per_epoch))
    if epochs is None:
        warmup_steps = min(config.warmup_steps, math.ceil(config.steps / 10))
        return config.with_options(eval_interval=interval, warmup_steps=warmup_steps)
    steps = max(1, round(epochs * steps_per_epoch))
    evaluations = round(steps / interval)
    # Rounding `interval` moves each evaluation by up to half a step, and so does rounding `steps`.
    if abs(steps - evaluations * interval) <= (evaluations + 1) / 2:
        steps = evaluations * interval
    warmup_steps = min(config.warmup_steps, math.ceil(steps / 10))
    return config.with_options(steps=steps, eval_interval=interval, warmup_steps=warmup_steps)


def row_tokens(config: TrainConfig) -> int:
    """Return the maximum number of tokens per row."""
    context = config.model.context_tokens
    found = config.task_options.row_tokens or context
    if found > context:
        raise InputError(
            f"row_tokens: expected at most the context of {context} tokens, got {found}"
        )
    return found


class RecordLoader:
    """The training batches of one rank. The top of this file defines them.

    Args:
        rows: all training rows. `rows[indices]` is a batch, and `rows.num_targets` is known.
        context_tokens: tokens per row.
        execution: which rows of a step are this rank's.
    """

    def __init__(
        self, rows: TaskBatch, config: TrainConfig, execution: Execution, context_tokens: int
    ):
        self.context_tokens = context_tokens
        self._rows = rows
        self._batch_size = config.batch_size
        self._seed = config.seed
        self._per_rank = config.batch_size // execution.world.data_ranks
        self._first = execution.world.data_rank * self._per_rank

    def batch(self, step: int) -> TaskBatch:
        """Return this rank's batch of a step: batch_size / data_ranks rows."""
        return self._rows[self._indices(self._first, self._per_rank, step)]

    def num_targets(self, step: int) -> int:
        """Return the targets in the batch of a step over all ranks, without communication."""
        return int(self._rows.num_targets[self._indices(0, self._batch_size, step)].sum())

    def _indices(self, first: int, rows: int, step: int) -> np.ndarray:
        return permuted_positions(
            step * self._batch_size + first, np.arange(rows), len(self._rows), self._seed
        )


def record_batches(rows: TaskBatch, execution: Execution) -> Iterator[TaskBatch]:
    """Yield the rows of this rank in order. Every rank gets the same number of batches.

    Args: rows: `rows.without_targets()` has weights of 0. A rank without rows gets one such row.
    """
    size = execution.micro_batch
    world = execution.world
    for start in range(0, len(rows), size * world.data_ranks):
        first = start + world.data_rank * size
        has_rows = first < len(rows)
        yield rows[first : first + size] if has_rows else rows[:1].without_targets()


def describe_epochs(config: TrainConfig, rows: int, splits: Sequence[int]) -> str:
    """Return one line about the records and the length of a new run."""
    train, val, test = splits
    epochs = config.steps * config.batch_size / rows
    return (
        f"{train:,} training, {val:,} validation and {test:,} test records; "
        f"{plural(epochs, 'epoch', '.3g')} in {plural(config.steps, 'step')} of "
        f"{plural(config.batch_size, 'row')}"
    )
