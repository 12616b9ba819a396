"""The steps of a run: train, evaluate, save, stop, and go back after bad steps."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import DivergedError, InterruptedRun
from ..model import GPT
from ..model.generation import Sampling
from .config import DIVERGED, TrainConfig
from .data.dataset import Dataset
from .data.loader import Batch, Loader, evaluation_batches
from .data.shards import DataChanged
from .eval.in_training import TrainingEvaluations
from .evaluate import Evaluation, evaluate
from .run.checkpoint import checkpoints
from .run.metrics import Metrics, console
from .run.plots import plot_loss
from .run.profile import profiled
from .run.samples import add_sample
from .run.saver import CheckpointSaver
from .run.signals import Signals
from .schedule import learning_rate
from .text import sample_text
from .trainer import Trainer


@dataclass(frozen=True)
class Session:
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
    evaluations: TrainingEvaluations | None = None
    """Other texts and files to evaluate on."""

    def run_steps(self, first: int, loader: Loader, batches: Iterator[Batch]) -> Evaluation:
        """Run the steps from `first` to the last. Returns: the last evaluation."""
        config = self.config
        trainer = self.trainer
        world = trainer.engine.world
        device = trainer.engine.execution.device
        steps = range(first, config.steps)
        for step in profiled(steps, config, self.run, self.metrics, device, world):
            if self.signals.received:
                self.stop(step)
            if config.max_bad_steps and len(self.metrics.bad_steps) >= config.max_bad_steps:
                self.go_back(step)
            # Evaluate at the beginning of a step, not at the end of the one before. A run that
            # stopped between the two then evaluates after it is resumed.
            is_due = step > 0 and step % config.report.eval_interval == 0
            if is_due and step not in self.metrics.evaluated:
                self.evaluate(step)

            lr = learning_rate(config, step)
            with self.metrics.waiting(), self.reading_data(step):
                batch = next(batches)
            num_targets = loader.num_targets(step) if world.size > 1 else None
            backward = functools.partial(trainer.backward, batch, num_targets, step=step)
            loss = self.signals.interruptible(backward)
            if loss is None:
                self.stop(step)
            grad_norm = trainer.update(lr)
            self.metrics.step(step, loss, lr, grad_norm, trainer.optimizer.skipped)

            done = step + 1
            world.mark(done)
            if done == config.steps or done % config.report.checkpoint_interval == 0:
                self.save(done)
        result = self.evaluate(config.steps)
        if first < config.steps:
            self.metrics.write_goodput(config.steps)
        return result

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
        if self.saver.last_step != done and self.trainer.is_finite():
            self.begin_checkpoint(done)
        self.saver.wait()

    def save(self, done: int) -> None:
        """Begin the checkpoint after `done` steps. Go back if the weights are not finite."""
        with self.metrics.paused("checkpoints"):
            is_finite = self.trainer.is_finite()
            if is_finite:
                self.begin_checkpoint(done)
        if not is_finite:
            self.go_back(done)

    def begin_checkpoint(self, done: int) -> None:
        """Begin the checkpoint of weights that are finite."""
        self.check_folder()
        self.metrics.sync()
        self.saver.save(done)
        self.metrics.checkpoint_stall = self.saver.stall_seconds
        self.metrics.write_goodput(done)

    def evaluate(self, done: int) -> Evaluation:
        """Evaluate and sample after `done` steps. Go back if the loss is not finite.

        Raises: InterruptedRun if a signal was received. A checkpoint is written before.
        """
        with self.metrics.paused("evaluation"):
            result = None
            diverged = None
            is_last = done == self.config.steps
            max_tokens = None if is_last else self.config.report.eval_tokens
            evaluation = functools.partial(
                _evaluate, self.config, self.trainer, self.dataset, self.signals, max_tokens
            )
            try:
                with self.reading_data(done):
                    result = self.signals.interruptible(evaluation)
            except DivergedError as error:
                diverged = error
            is_stopping = self.signals.received
            if result is not None and not is_stopping:
                self.check_folder()
                more = self.evaluate_more(is_last)
                # A sample without evaluation is written again after a resume.
                is_stopping = more is None or not self.write_sample(done)
                if not is_stopping:
                    self.metrics.evaluation(done, result, more)
                    is_stopping = not self.draw()
                gc.collect()
        if is_stopping:
            self.stop(done)
        if diverged is not None:
            self.go_back(done)
        return result

    def evaluate_more(self, is_last: bool) -> dict[str, float] | None:
        """Evaluate on other texts and files, on rank 0. Returns: None if a signal came."""
        if self.evaluations is None:
            return {}
        engine = self.trainer.engine
        model = engine.complete_model()
        measure = functools.partial(
            self.evaluations.measure,
            model,
            batch_size=engine.execution.micro_batch,
            is_last=is_last,
            # The other ranks wait: show them that rank 0 does not hang.
            report=lambda _: engine.world.mark(),
        )
        return engine.world.on_rank0(lambda: self.signals.interruptible(measure, is_local=True))

    def draw(self) -> bool:
        """Draw loss.png on rank 0. Returns: False if a signal came."""
        draw = functools.partial(_draw, self.run)
        world = self.trainer.engine.world
        return bool(world.on_rank0(lambda: self.signals.interruptible(draw, is_local=True)))

    def write_sample(self, done: int) -> bool:
        """Append a sample to samples.txt. Returns: False if a signal came."""
        engine = self.trainer.engine
        model = engine.complete_model()
        write = functools.partial(_write_sample, self.config, self.run, model, self.dataset, done)
        return bool(engine.world.on_rank0(lambda: self.signals.interruptible(write, is_local=True)))

    def stop(self, done: int) -> NoReturn:
        """Write a checkpoint after `done` steps, if there is none. Raises: InterruptedRun."""
        with self.metrics.paused("checkpoints"):
            self.save_once(done)
        raise InterruptedRun(self.signals.number())

    def go_back(self, step: int) -> None:
        """Restore the newest checkpoint before the bad steps, and go on with `step`.

        The steps between that checkpoint and `step` are lost, and their data is left out: the run
        ends like a run that never saw it. See bad_steps.py.

        Raises: DivergedError if the run went back to this checkpoint already, or has no more steps.
        """
        bad_steps = self.metrics.bad_steps
        # Without bad steps a checkpoint after `step` steps has weights that do not work.
        before = bad_steps[0]["step"] if bad_steps else step - 1
        with self.metrics.paused("restarts"):
            # The checkpoints before the bad steps may have been deleted for newer ones.
            self.saver.wait()
            oldest = self.trainer.engine.world.on_rank0(lambda: min(checkpoints(self.run)))
            restored = self.saver.load(max(before, oldest))
            last = self.metrics.restored
            is_repeated = last is not None and last["step"] == restored
            if is_repeated or step == self.config.steps:
                raise DivergedError(_describe_divergence(bad_steps, step, restored, last))
            what = f"{len(bad_steps)} bad steps in a row" if bad_steps else "weights are not finite"
            console.print(
                f"step {step}: {what}; restored the checkpoint of step {restored}, left out the "
                f"data of steps {restored} to {step - 1}"
            )
            self.metrics.went_back(step, restored)
            self.begin_checkpoint(step)


def _describe_divergence(bad_steps: list[dict], step: int, restored: int, last: dict | None) -> str:
    """Say which steps were bad, and what the run did about them."""
    if bad_steps:
        first, newest = bad_steps[0], bad_steps[-1]
        found = (
            f"steps {first['step']} to {newest['step']} were bad: loss {first['loss']}, gradient "
            f"norm {first['grad_norm']}, learning rate {first['lr']:.3g}"
        )
    else:
        found = f"the weights are not finite after {step} steps"
    if last is not None and last["step"] == restored:
        found += (
            f"; the run had left out the data of steps {last['restored']} to {last['step'] - 1} "
            "already"
        )
    return f"{DIVERGED} ({found})"


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


def _write_sample(config: TrainConfig, run: Path, model: GPT, dataset: Dataset, step: int) -> bool:
    """Add a sample to samples.txt. Returns: True."""
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
    return True


def _draw(run: Path) -> bool:
    """Draw loss.png. Returns: True."""
    plot_loss(run)
    return True
