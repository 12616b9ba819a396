"""The training loop, from a configuration to a trained model.

A run is a folder: config.json (all that is needed to repeat it), tokenizer.json, metrics.jsonl,
samples.txt, loss.png, checkpoints/step-N. On one CPU, the weights of a resumed run are bitwise
equal to the weights of a run that never stopped.
"""

import gc
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError, InterruptedRun
from ..model import GPT, GPTConfig
from ..model.cost import flops_per_token
from ..model.generation import Sampling
from .config import TrainConfig
from .data.dataset import Dataset, open_dataset
from .data.loader import Batch, Loader, evaluation_batches
from .data.prefetch import Prefetch
from .data.prepare import cache_dir, prepare
from .device import choose_matmul, keep_freed_memory
from .distributed.engines import SingleProcess
from .distributed.world import SINGLE_PROCESS, World
from .evaluate import Evaluation, evaluate
from .execution import Execution, resolve
from .optim import Optimizer
from .run.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from .run.folder import check_folder_unused, claim_folder, open_recorded_dataset, read_run
from .run.metrics import Metrics, console
from .run.models import open_model
from .run.plots import plot_loss
from .run.profile import check_profile_steps, profiled
from .run.signals import Signals
from .run.trackers import check_trackers, open_trackers
from .schedule import learning_rate
from .text import sample_text
from .trainer import Trainer, quiet_collector

# A published model can have this many rows in its vocabulary that no token uses: nanoGPT rounds
# the size of the vocabulary up to a multiple of 64, others to a multiple of 128.
_PADDING_TOKENS = 128


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
    model = world.run_on_all_ranks(lambda: _initial_model(config, dataset))
    world.on_rank0(lambda: claim_folder(run, config, model.config, dataset))
    return _train(config, run, model, dataset, execution, None)


def resume(run: Path, world: World = SINGLE_PROCESS) -> Evaluation:
    """Continue a stopped run from its newest checkpoint. Returns and Raises: see `start`."""
    record = world.on_rank0(lambda: read_run(run))
    checkpoint = world.on_rank0(lambda: newest_checkpoint(run))
    execution = _resolve_on_all_ranks(record.train, world)
    dataset = world.on_each_node(
        lambda: open_recorded_dataset(record, run, progress=world.is_rank0)
    )
    # The model it started from may be gone. The checkpoint has all weights.
    model = _new_model(record.train, record.model)
    return _train(record.train, run, model, dataset, execution, checkpoint)


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


def _check_initial_model(config: TrainConfig, dataset: Dataset) -> None:
    """Raise InputError if the model to start from has another shape or another tokenizer."""
    trained = open_model(Path(config.init_from))
    # Dropout is an option of the run, not of the model.
    found = config.gpt(trained.config.vocab_size)
    expected = trained.config.with_dropout_of(found)
    if expected != found:
        raise InputError(f"init_from: expected a model of shape {found}, got {expected}")
    tokenizer = dataset.tokenizer
    if trained.tokenizer_path is not None:
        own = trained.tokenizer()
        if own.sha256 != tokenizer.sha256:
            raise InputError(
                f"tokenizer: expected {own.name} of {config.init_from}, got {tokenizer.name} with "
                "other tokens; leave `tokenizer` out"
            )
    elif not 0 <= expected.vocab_size - tokenizer.vocab_size < _PADDING_TOKENS:
        raise InputError(
            f"tokenizer: expected {expected.vocab_size} tokens, as in {config.init_from}, got "
            f"{tokenizer.vocab_size}; use the tokenizer of the model"
        )


def _initial_model(config: TrainConfig, dataset: Dataset) -> GPT:
    """Return a model with new weights, or the model to start from, in float32."""
    if config.init_from is None:
        return _new_model(config, config.gpt(dataset.tokenizer.vocab_size))
    _check_initial_model(config, dataset)
    torch.manual_seed(config.seed)
    model = open_model(Path(config.init_from)).load(**_model_options(config)).float()
    model.config = config.gpt(model.config.vocab_size)  # with the dropout of the run
    return model.train()


def _new_model(config: TrainConfig, shape: GPTConfig) -> GPT:
    """Return a model with new weights."""
    torch.manual_seed(config.seed)
    return GPT(shape, **_model_options(config))


def _model_options(config: TrainConfig) -> dict[str, str]:
    return {
        "attention": config.execution.attention,
        "recompute": config.execution.recompute,
    }


def _train(
    config: TrainConfig,
    run: Path,
    model: GPT,
    dataset: Dataset,
    execution: Execution,
    checkpoint: Path | None,
) -> Evaluation:
    """Train from a checkpoint, or from the weights of `model`."""
    world = execution.world
    world.check_same_on_all_ranks(
        "data", (dataset.tokenizer.sha256[:12], len(dataset.train), len(dataset.val))
    )
    choose_matmul(execution.device)
    keep_freed_memory()

    # The model and its optimizer.
    engine = execution.engine(model.to(execution.device), execution)
    optimizer = Optimizer(engine, config)
    if checkpoint is None:
        first = 0
        _save_first(config, run, engine, optimizer)
    else:
        first = load_checkpoint(checkpoint, engine, optimizer)

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
    ):
        session = _Session(config, run, dataset, trainer, metrics, signals)
        return session.run_steps(first, loader, batches)


def _save_first(
    config: TrainConfig, run: Path, engine: SingleProcess, optimizer: Optimizer
) -> None:
    """Write a checkpoint before the first step, so that the run can be resumed from there.

    If the disk is too small, the run fails here and not hours later.
    """
    try:
        save_checkpoint(run, 0, engine, optimizer, keep=config.report.keep_checkpoints)
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
    metrics: Metrics
    signals: Signals

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
            with self.metrics.waiting():
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

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps."""
        trainer = self.trainer
        keep = self.config.report.keep_checkpoints
        save_checkpoint(self.run, done, trainer.engine, trainer.optimizer, keep=keep)

    def evaluate_or_stop(self, done: int) -> Evaluation:
        """Evaluate and sample after `done` steps.

        Raises: InterruptedRun if a signal was received. A checkpoint is written before.
        """
        engine = self.trainer.engine
        is_last = done == self.config.steps
        max_tokens = None if is_last else self.config.report.eval_tokens
        with self.metrics.paused():
            result = _evaluate(self.config, self.trainer, self.dataset, self.signals, max_tokens)
            if self.signals.received:
                folder = self.run / "checkpoints" / f"step-{done}"
                if not engine.world.on_rank0(folder.exists):
                    self.save(done)
                raise InterruptedRun(self.run)
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
    """Append a sample to samples.txt and draw loss.png."""
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
    with open(run / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"--- step {step}\n{text}\n")
    plot_loss(run)
