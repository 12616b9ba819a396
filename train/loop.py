"""The training loop, from a configuration to a trained model.

A run is a folder: config.json (all that is needed to repeat it), tokenizer.json, metrics.jsonl,
samples.txt, loss.png, checkpoints/step-N. On one CPU, the weights of a resumed run are bitwise
equal to the weights of a run that never stopped.
"""

import contextlib
import gc
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InterruptedRun
from ..model import GPT
from ..model.cost import check_size, flops_per_token
from ..model.generation import Sampling
from ._initial_model import initial_model, new_model
from .config import TrainConfig
from .data.dataset import Dataset, open_dataset
from .data.loader import Batch, Loader, evaluation_batches
from .data.prefetch import Prefetch
from .data.prepare import cache_dir, prepare
from .data.shards import DataChanged
from .device import choose_matmul, keep_freed_memory
from .distributed.engines import SingleProcess
from .distributed.world import SINGLE_PROCESS, World
from .evaluate import Evaluation, evaluate
from .execution import Execution, resolve
from .optim import Optimizer
from .run.checkpoint import newest_checkpoint
from .run.folder import (
    RunRecord,
    check_folder_unused,
    check_tokenizer,
    claim_folder,
    is_unstarted,
    only_writer,
    open_recorded_dataset,
    read_run,
)
from .run.history import note_resume, with_changes
from .run.metrics import Metrics, console
from .run.plots import plot_loss
from .run.profile import check_profile_steps, profiled
from .run.samples import add_sample
from .run.saver import CheckpointSaver, check_space_for_run
from .run.signals import Signals
from .run.trackers import check_trackers, open_trackers
from .schedule import learning_rate
from .text import sample_text
from .trainer import Trainer, quiet_collector


def start(config: TrainConfig, run: Path, world: World = SINGLE_PROCESS) -> Evaluation:
    """Train a new model. Rank 0 writes the folder `run`.

    Returns: the evaluation of the finished model on all held-out text.
    Raises: InputError if the folder is in use, the data is bad, options do not fit together or the
        training diverges; InterruptedRun after SIGINT or SIGTERM.
    """
    world.on_rank0(lambda: check_folder_unused(run))
    execution = _resolve_on_all_ranks(config, world)
    check_profile_steps(config)
    dataset = world.on_each_node(lambda: _prepare_dataset(config, progress=world.is_rank0))
    # Read the model to start from before anything is written: it may be damaged.
    model = world.run_on_all_ranks(lambda: initial_model(config, dataset))
    with only_writer(run, world) as check_folder:
        summary = execution.summary()
        world.on_rank0(lambda: claim_folder(run, config, model.config, dataset, summary))
        return _train(config, run, model, dataset, execution, check_folder, None)


def resume(
    run: Path, world: World = SINGLE_PROCESS, changes: dict[str, Any] | None = None
) -> Evaluation:
    """Continue a stopped run from its newest checkpoint. Returns and Raises: see `start`.

    Args:
        changes: new values of options, by their flat names. history.py has the names. Without
            changes the result is that of a run that never stopped.
    """
    record = world.on_rank0(lambda: read_run(run))
    config = with_changes(run, record.train, changes or {})
    if world.on_rank0(lambda: is_unstarted(run)):
        return start(config, run, world)
    with only_writer(run, world) as check_folder:
        world.on_rank0(lambda: newest_checkpoint(run))
        files = run / "checkpoints"
        world.on_rank0(lambda: check_size(files, record.model, bytes_per_parameter=4))
        execution = _resolve_on_all_ranks(config, world)
        check_profile_steps(config)
        if config.data != record.train.data:
            dataset = world.on_each_node(lambda: _prepare_dataset(config, progress=world.is_rank0))
            check_tokenizer(dataset, record, run)
        else:
            dataset = world.on_each_node(
                lambda: open_recorded_dataset(record, run, progress=world.is_rank0)
            )
        # The model it started from may be gone. The checkpoint has all weights.
        model = new_model(config, record.model)
        return _train(config, run, model, dataset, execution, check_folder, record)


# --- before the first step


def _resolve_on_all_ranks(config: TrainConfig, world: World) -> Execution:
    def resolved() -> Execution:
        check_trackers(config)
        return resolve(config, world)

    execution = world.run_on_all_ranks(resolved)
    world.check_same_on_all_ranks("device", execution.device.type)
    return execution


def _prepare_dataset(config: TrainConfig, *, progress: bool) -> Dataset:
    """Build or find the dataset, and check that the run can use it."""
    path = prepare(
        config.data,
        config.tokenizer,
        cache_dir() / "datasets",
        held_out=config.held_out,
        progress=progress,
    )
    dataset = open_dataset(path)
    # Raise now if the prompt, an evaluation or a batch would raise later in the run.
    T = config.model.context_tokens
    dataset.tokenizer.encode(config.prompt)
    next(evaluation_batches(dataset.val, context_tokens=T, batch_size=1, max_tokens=1))
    Loader(dataset.train, context_tokens=T, batch_size=config.batch_size, seed=config.seed)
    return dataset


def _train(
    config: TrainConfig,
    run: Path,
    model: GPT,
    dataset: Dataset,
    execution: Execution,
    check_folder: Callable[[], None],
    record: RunRecord | None,
) -> Evaluation:
    """Train a new run (`record` is None), or from the newest checkpoint of a recorded one."""
    world = execution.world
    world.check_same_on_all_ranks(
        "data", (dataset.tokenizer.sha256[:12], len(dataset.train), len(dataset.val))
    )
    choose_matmul(execution.device)
    keep_freed_memory()

    # The model and its optimizer.
    engine = execution.engine(model.to(execution.device), execution)
    optimizer = Optimizer(engine, config)
    saver = CheckpointSaver(run, engine, optimizer, config.report)
    if record is None:
        first = 0
        _save_first(config, run, engine, saver)
    else:
        first = saver.load()
        world.on_rank0(lambda: check_space_for_run(run, config, engine))
        world.on_rank0(lambda: note_resume(run, record, config, dataset, execution, first))

    # The data, and the metrics of its steps.
    on_cuda = execution.device.type == "cuda"
    loader = Loader(
        dataset.train,
        context_tokens=config.model.context_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=world.data_rank,
        world_size=world.data_ranks,
        pinned=on_cuda,
        # The embedding's kernels use the order of each micro-batch. A CPU needs none.
        sorted_rows=execution.micro_batch if on_cuda else None,
    )
    metrics = _open_metrics(config, run, engine, optimizer, first)
    if execution.is_compiled:
        console.print("compiling the model: the first step takes longer if it is not in the cache")

    # The steps.
    separator = dataset.tokenizer.end_of_text if config.document_mask else None
    trainer = Trainer(engine, optimizer, separator=separator, seed=config.seed)
    with (
        metrics,
        Signals(world) as signals,
        quiet_collector(),
        Prefetch(loader.batch, first) as batches,
        saver,
    ):
        session = _Session(config, run, dataset, trainer, saver, metrics, signals, check_folder)
        return session.run_steps(first, loader, batches)


def _save_first(
    config: TrainConfig, run: Path, engine: SingleProcess, saver: CheckpointSaver
) -> None:
    """Write a checkpoint before the first step, so that the run can be resumed from there.

    If the disk is too small, the run fails here and not hours later.
    """
    try:
        engine.world.on_rank0(lambda: check_space_for_run(run, config, engine))
        saver.save(0, background=False)
    except BaseException:
        if engine.world.is_rank0:
            shutil.rmtree(run)
        raise


def _open_metrics(
    config: TrainConfig, run: Path, engine: SingleProcess, optimizer: Optimizer, first: int
) -> Metrics:
    T = config.model.context_tokens
    world = engine.world
    return Metrics(
        run,
        start=first,
        steps=config.steps,
        tokens_per_step=config.batch_size * T,
        flops_per_token=flops_per_token(engine.model.config, T),
        device=engine.execution.device,
        skips_overflow=optimizer.scaler.is_enabled(),
        world=world,
        trackers=open_trackers(config, run, first) if world.is_rank0 else (),
    )


# --- the steps


@dataclass(frozen=True)
class _Session:
    """A run in progress in this process."""

    config: TrainConfig
    run: Path
    dataset: Dataset
    trainer: Trainer
    saver: CheckpointSaver
    metrics: Metrics
    signals: Signals
    check_folder: Callable[[], None]
    """Raises InputError if the folder of the run was moved or deleted."""

    def run_steps(self, first: int, loader: Loader, batches: Iterator[Batch]) -> Evaluation:
        """Run the steps from `first` to the last. Returns: the last evaluation."""
        config = self.config
        world = self.trainer.engine.world
        device = self.trainer.engine.execution.device
        steps = range(first, config.steps)
        for step in profiled(steps, config, self.run, self.metrics, device, world):
            # Evaluate at the beginning of a step, not at the end of the one before. A run that
            # stopped between the two then evaluates after it is resumed.
            is_due = step > 0 and step % config.report.eval_interval == 0
            if self.signals.received or (is_due and step not in self.metrics.evaluated):
                self.evaluate_or_stop(step)

            lr = learning_rate(config, step)
            with self.metrics.waiting(), self.reading_data(step):
                batch = next(batches)
            num_targets = loader.num_targets(step) if world.size > 1 else None
            loss = self.trainer.backward(batch, num_targets, step=step)
            grad_norm = self.trainer.update(lr)
            self.metrics.step(step, loss, lr, grad_norm)

            done = step + 1
            world.mark(done)
            if done == config.steps or done % config.report.checkpoint_interval == 0:
                with self.metrics.paused():
                    self.save(done)
        return self.evaluate_or_stop(config.steps)

    @contextlib.contextmanager
    def reading_data(self, done: int) -> Iterator[None]:
        """Write a checkpoint after `done` steps if a shard was cut or overwritten."""
        try:
            yield
        except DataChanged:
            # Other ranks may read undamaged shards. They cannot help to write a checkpoint.
            if self.trainer.engine.world.size == 1:
                self.metrics.flush()
                self.save_once(done)
            raise

    def save_once(self, done: int) -> None:
        """Write a checkpoint after `done` steps, unless there is one, and wait for it."""
        if self.saver.last_step != done:
            self.save(done)
        self.saver.wait()

    def save(self, done: int) -> None:
        """Begin the checkpoint after `done` steps."""
        self.check_folder()
        self.saver.save(done)
        self.metrics.checkpoint_stall = self.saver.stall_seconds

    def evaluate_or_stop(self, done: int) -> Evaluation:
        """Evaluate and sample after `done` steps.

        Raises: InterruptedRun if a signal was received. A checkpoint is written before.
        """
        engine = self.trainer.engine
        is_last = done == self.config.steps
        max_tokens = None if is_last else self.config.report.eval_tokens
        with self.metrics.paused():
            with self.reading_data(done):
                result = _evaluate(
                    self.config, self.trainer, self.dataset, self.signals, max_tokens
                )
            if self.signals.received:
                self.save_once(done)
                raise InterruptedRun(self.run)
            self.check_folder()
            self.metrics.evaluation(done, result)
            model = engine.complete_model()
            engine.world.on_rank0(
                lambda: _write_sample(self.config, self.run, model, self.dataset, done)
            )
            gc.collect()
        return result


def _evaluate(
    config: TrainConfig,
    trainer: Trainer,
    dataset: Dataset,
    signals: Signals,
    max_tokens: int | None,
) -> Evaluation | None:
    """Evaluate on held-out text. A signal ends it early. Returns: None without any batch."""
    execution = trainer.engine.execution
    batches = evaluation_batches(
        dataset.val,
        context_tokens=config.model.context_tokens,
        batch_size=execution.micro_batch,
        max_tokens=max_tokens,
        rank=execution.world.data_rank,
        world_size=execution.world.data_ranks,
    )
    return evaluate(
        trainer.working,
        itertools.takewhile(lambda _: not signals.received, batches),
        bytes_per_token=dataset.info.val.bytes / dataset.info.val.tokens,
        separator=trainer.separator,
        world=execution.world,
    )


def _write_sample(config: TrainConfig, run: Path, model: GPT, dataset: Dataset, step: int) -> None:
    """Add a sample to samples.txt and draw loss.png."""
    text = sample_text(
        model,
        dataset.tokenizer,
        config.prompt,
        Sampling(
            max_new_tokens=config.report.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            seed=config.seed,
        ),
    )
    add_sample(run, step, text)
    plot_loss(run)
