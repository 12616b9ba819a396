"""The data of a run, and what its task does with it: the base class TaskData."""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...model import GPT, GPTConfig
from ..config import TrainConfig
from ..data.tokenizers.tokenizer import Tokenizer
from ..distributed.engines import SingleProcess
from ..distributed.world import World
from ..evaluate import Evaluation, evaluate
from ..execution import Execution


class TaskBatch(Protocol):
    """Rows of a task on the CPU. `len(batch)` is the number of rows, and a slice is a batch.

    Attributes:
        num_targets: (rows,) int64, the weight of each row in the mean loss.
    """

    num_targets: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> "TaskBatch": ...

    def model_inputs(
        self, device: torch.device, dropout_seed: int | None = None
    ) -> dict[str, Tensor]:
        """Return the arguments of the model's forward, without waiting for the device.

        forward(**inputs) returns the mean loss over the targets, () float32.
        """


class TaskLoader(Protocol):
    """The training batches of one rank. Batches are functions of the step: a resume is exact.

    Attributes:
        context_tokens: tokens per row.
    """

    context_tokens: int

    def batch(self, step: int) -> TaskBatch:
        """Return this rank's batch_size / data_ranks rows of a step."""

    def num_targets(self, step: int) -> int:
        """Return the sum of `num_targets` in the batch of a step over all ranks."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The data of a run. Each task has a subclass.

    A subclass must define `loader` and `evaluation_batches`.
    """

    path: Path
    """The dataset or file. config.json records it."""
    tokenizer: Tokenizer
    train: Sized
    """len() is the number of training tokens, or of rows of records."""
    val: Sized
    """len() is the number of validation tokens, or of rows of records."""
    sha256: str | None = None
    """Hash of the file. config.json records it. None: a dataset, which has its own checksums."""

    @property
    def has_test(self) -> bool:
        """Whether `finish` has something to do: whether there are test records."""
        return False

    def fit(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration of a new run with the values that follow from the data."""
        return config

    def describe(self, config: TrainConfig) -> str:
        """Return one line about the data of a new run."""
        raise NotImplementedError

    def new_model(self, config: TrainConfig, shape: GPTConfig) -> GPT:
        """Return a model with new weights: a GPT or a subclass. A resume loads a checkpoint."""
        return GPT(shape, **model_options(config))

    def adapt(self, trained: GPT, config: TrainConfig) -> GPT:
        """Return the model of a new run that starts from a trained GPT with the run's options."""
        return trained

    def begin(self, run: Path, engine: SingleProcess, config: TrainConfig, step: int) -> None:
        """Prepare the first step of this process. All ranks call it, after the first checkpoint.

        Args: step: number of steps done. 0: the model has its initial weights.
        """

    def loader(self, config: TrainConfig, execution: Execution) -> TaskLoader:
        """Return the training batches of this rank."""
        raise NotImplementedError

    def evaluation_batches(
        self, config: TrainConfig, execution: Execution, *, is_last: bool
    ) -> Iterable[TaskBatch]:
        """Return the validation batches of this rank.

        Args: is_last: whether this is the evaluation after the last step, of all held-out data.
        """
        raise NotImplementedError

    def evaluation_rows(self, config: TrainConfig) -> int:
        """Return the number of rows of the evaluation after the last step, over all ranks."""
        return len(self.val)

    def evaluate(self, model: GPT, batches: Iterable[TaskBatch], world: World) -> Evaluation | None:
        """Evaluate the model on `batches`, on all ranks. A signal can end `batches` early.

        Returns: None without any targets.
        Raises: DivergedError if the loss is not finite.
        """
        return evaluate(model, batches, world=world)

    def sample(self, model: GPT, config: TrainConfig) -> str | None:
        """Return the text for samples.txt on rank 0. None: no sample."""
        return None

    def finish(
        self, run: Path, model: GPT, config: TrainConfig, report: Callable[[], None]
    ) -> None:
        """Write the results of the test records into the run on rank 0, after the last step.

        Args:
            model: the trained model, on its device.
            report: call it often. It shows the other ranks that rank 0 does not hang.
        """


def model_options(config: TrainConfig) -> dict[str, str]:
    """Return the arguments of GPT that are options of the execution."""
    return {
        "attention": config.execution.attention,
        "recompute": config.execution.recompute,
    }
