"""The task "pretrain": predict the next token of text. See tasks.py."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..model import GPT
from ..model.generation import Sampling
from .config import TrainConfig
from .data.dataset import Dataset, open_dataset
from .data.epochs import describe_epochs
from .data.loader import Batch, Loader, evaluation_batches
from .data.prepare import prepare_for
from .distributed.world import World
from .eval.in_training import open_evaluations
from .evaluate import Evaluation, evaluate
from .execution import Execution
from .finetune.data import TaskData
from .generation.text import sample_text
from .run.folder import RunRecord, check_tokenizer, open_recorded_dataset


def open_data(
    config: TrainConfig,
    *,
    record: RunRecord | None = None,
    run: Path | None = None,
    progress: bool = False,
) -> "TextData":
    """Build or find the dataset of a run.

    Args:
        record: config.json of the run that is resumed. None: a new run.
        run: its folder.
        progress: whether to show a progress bar.
    Raises: InputError if the run cannot use the dataset.
    """
    if record is not None and config.data == record.train.data:
        dataset = open_recorded_dataset(record, run, progress=progress)
    else:
        dataset = _prepare_dataset(config, progress=progress)
        if record is not None:
            check_tokenizer(dataset, record, run)
    return TextData(**vars(dataset))


def _prepare_dataset(config: TrainConfig, *, progress: bool) -> Dataset:
    """Build or find the dataset, and check that the run can use it."""
    dataset = open_dataset(prepare_for(config, progress=progress))
    # Raise now if the prompt, an evaluation or a batch would raise later in the run.
    T = config.model.context_tokens
    dataset.tokenizer.encode(config.prompt)
    open_evaluations(config, dataset.tokenizer)
    next(evaluation_batches(dataset.val, context_tokens=T, batch_size=1, max_tokens=1))
    Loader(dataset.train, context_tokens=T, batch_size=config.batch_size, seed=config.seed)
    return dataset


@dataclass(frozen=True, kw_only=True)
class TextData(Dataset, TaskData):
    """A dataset of text."""

    def describe(self, config: TrainConfig) -> str:
        """Return how often the run reads the dataset."""
        tokens = config.steps * config.batch_size * config.model.context_tokens
        return describe_epochs(tokens, len(self.train), config.model.dropout)

    def loader(self, config: TrainConfig, execution: Execution) -> Loader:
        """Return the training batches of this rank."""
        on_cuda = execution.device.type == "cuda"
        return Loader(
            self.train,
            context_tokens=config.model.context_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=execution.world.data_rank,
            world_size=execution.world.data_ranks,
            pinned=on_cuda,
            # The embedding's kernels use the order of each micro-batch. A CPU needs none.
            sorted_rows=execution.micro_batch if on_cuda else None,
            separator=self._separator(config),
        )

    def evaluation_batches(
        self, config: TrainConfig, execution: Execution, *, is_last: bool
    ) -> Iterable[Batch]:
        """Return held-out text: all of it in the last evaluation, else `eval_tokens` of it."""
        return evaluation_batches(
            self.val,
            context_tokens=config.model.context_tokens,
            batch_size=execution.micro_batch,
            max_tokens=None if is_last else config.report.eval_tokens,
            rank=execution.world.data_rank,
            world_size=execution.world.data_ranks,
            separator=self._separator(config),
        )

    def evaluation_rows(self, config: TrainConfig) -> int:
        """Return the number of rows of the evaluation after the last step, over all ranks."""
        return -(-(len(self.val) - 1) // config.model.context_tokens)

    def _separator(self, config: TrainConfig) -> int | None:
        return self.tokenizer.end_of_text if config.document_mask else None

    def evaluate(self, model: GPT, batches: Iterable[Batch], world: World) -> Evaluation | None:
        """Evaluate the model on `batches`, on all ranks. See TaskData.evaluate."""
        bytes_per_token = self.info.val.bytes / self.info.val.tokens
        return evaluate(model, batches, bytes_per_token=bytes_per_token, world=world)

    def sample(self, model: GPT, config: TrainConfig) -> str:
        """Return the prompt of the run with its continuation.

        With a low temperature, without unlikely tokens and with a penalty on repeated tokens, small
        models write fewer broken lines of code. Text repeats its characters and bytes, so they have
        no penalty.
        """
        is_penalized = self.tokenizer.kind not in ("chars", "bytes")
        sampling = Sampling(
            max_new_tokens=config.report.sample_tokens,
            temperature=0.4,
            min_p=0.2,
            repetition_penalty=1.15 if is_penalized else 1.0,
            seed=config.seed,
        )
        return sample_text(model, self.tokenizer, config.prompt, sampling)
