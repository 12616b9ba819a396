"""The steps of a run: train, evaluate, save, stop, and go back after bad steps."""

import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import DivergedError, InputError, plural
from .config import DIVERGED, TrainConfig
from .data.prefetch import Prefetch
from .distributed.world import World
from .eval.in_training import TrainingEvaluations
from .evaluate import Evaluation
from .finetune.data import TaskBatch, TaskData, TaskLoader
from .run.checkpoint import checkpoints, delete_newer
from .run.metrics import Metrics
from .run.plots import plot_loss
from .run.profile import profiled
from .run.samples import add_sample
from .run.saver import CheckpointSaver
from .run.signals import Signals
from .schedule import learning_rate
from .terminal.progress import console
from .trainer import Trainer


@dataclass(frozen=True)
class Session:
    """A run in progress in this process."""

    config: TrainConfig
    run: Path
    data: TaskData
    trainer: Trainer
    saver: CheckpointSaver
    metrics: Metrics
    signals: Signals
    check_folder: Callable[[], None]
    """Raises InputError if the folder of the run was moved or deleted."""
    evaluations: TrainingEvaluations | None = None
    """Other texts and files to evaluate on."""

    def run_steps(self, first: int, loader: TaskLoader, batches: Prefetch) -> Evaluation:
        """Run the steps from `first` to the last. Returns: the last evaluation."""
        config = self.config
        trainer = self.trainer
        world = trainer.engine.world
        device = trainer.engine.execution.device
        steps = range(first, config.steps)
        for step in profiled(steps, config, self.run, self.metrics, device, world):
            if self.signals.received:
                self.stop(step)
            if self.has_bad_series():
                self.go_back(step)
            # Evaluate at the beginning of a step, not at the end of the one before. A run that
            # stopped between the two then evaluates after it is resumed.
            is_due = step > 0 and step % config.report.eval_interval == 0
            if is_due and step not in self.metrics.evaluated:
                self.evaluate(step)

            lr = learning_rate(config, step)
            with self.metrics.waiting():
                batch = next(batches)
                # Ranks learn of a stop one step late. So the run must stop two steps before a batch
                # that cannot be read.
                error = batches.error(min(2, config.steps - step - 1))
            if isinstance(error, InputError | OSError):
                self.signals.request_stop(error)
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
        if self.data.has_test:
            self.finish()
        if first < config.steps:
            self.metrics.write_goodput(config.steps)
        self.signals.raise_error()  # A callback may have raised one.
        return result

    def finish(self) -> None:
        """Let the task write its results of the test records, on rank 0.

        Raises: InterruptedRun if a signal was received. A resumed run writes them again.
        """
        engine = self.trainer.engine
        model = engine.complete_model()
        with (
            self.metrics.paused("evaluation"),
            self.metrics.progress("test records", None) as advance,
        ):
            report = functools.partial(_report, engine.world, advance, 1)
            finish = functools.partial(self.data.finish, self.run, model, self.config, report)
            is_done = self.completes_on_rank0(finish)
        if not is_done:
            self.stop(self.config.steps)

    def save_once(self, done: int) -> None:
        """Write a checkpoint after `done` steps, unless there is one, and wait for it."""
        if self.saver.last_step != done and self.trainer.is_finite():
            self.begin_checkpoint(done)
        self.saver.wait()

    def save(self, done: int) -> None:
        """Begin the checkpoint after `done` steps. Go back if the weights are of no use."""
        with self.metrics.paused("checkpoints"):
            is_good = self.trainer.is_finite() and not self.has_bad_series()
            if is_good:
                self.begin_checkpoint(done)
        if not is_good:
            self.go_back(done)

    def has_bad_series(self) -> bool:
        """Return whether the last steps were bad, as many as `max_bad_steps` allows."""
        most = self.config.max_bad_steps
        return most > 0 and len(self.metrics.bad_steps) >= most

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
            batches = self.evaluation_batches(done)
            with self.metrics.progress("evaluation", self.evaluation_rows(batches)) as advance:
                evaluation = functools.partial(
                    _evaluate, self.trainer, self.data, self.signals, batches, advance
                )
                try:
                    result = self.signals.interruptible(evaluation)
                except DivergedError as error:
                    diverged = error
            is_stopping = self.signals.received
            if result is not None and not is_stopping:
                self.check_folder()
                more = self.evaluate_more(done == self.config.steps)
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
        work = self.evaluations.work(is_last)
        with self.metrics.progress("evaluation on other files", work) as advance:
            measure = functools.partial(
                self.evaluations.measure,
                model,
                batch_size=engine.execution.micro_batch,
                is_last=is_last,
                report=functools.partial(_report, engine.world, advance),
            )
            return engine.world.on_rank0(lambda: self.signals.interruptible(measure, is_local=True))

    def draw(self) -> bool:
        """Draw loss.png on rank 0. Returns: False if a signal came."""
        return self.completes_on_rank0(functools.partial(plot_loss, self.run))

    def evaluation_batches(self, done: int) -> Iterable[TaskBatch]:
        """Return held-out data. Raises: InputError if it cannot be read, after a checkpoint."""
        is_last = done == self.config.steps
        execution = self.trainer.engine.execution
        batches = self.data.evaluation_batches(self.config, execution, is_last=is_last)
        if is_last:
            return batches  # the complete data; the run has written its last checkpoint
        try:
            return execution.world.run_on_all_ranks(lambda: list(batches))
        except (InputError, OSError):
            self.save_once(done)
            raise

    def evaluation_rows(self, batches: Iterable[TaskBatch]) -> int:
        """Return the number of rows of an evaluation, over all ranks."""
        if isinstance(batches, list):
            return sum(map(len, batches)) * self.trainer.engine.execution.world.data_ranks
        return self.data.evaluation_rows(self.config)

    def write_sample(self, done: int) -> bool:
        """Append a sample to samples.txt. Returns: False if a signal came."""
        model = self.trainer.engine.complete_model()

        def write() -> None:
            text = self.data.sample(model, self.config)
            if text is not None:
                add_sample(self.run, done, text)

        return self.completes_on_rank0(write)

    def completes_on_rank0(self, work: Callable[[], object]) -> bool:
        """Run `work`, which does not communicate, on rank 0. Returns: False if a signal came."""

        def complete() -> bool:
            work()
            return True

        interruptible = functools.partial(self.signals.interruptible, complete, is_local=True)
        return bool(self.trainer.engine.world.on_rank0(interruptible))

    def stop(self, done: int) -> NoReturn:
        """Write a checkpoint after `done` steps, if there is none.

        Raises: InterruptedRun, or on all ranks the error of the rank that cannot read its data.
        """
        with self.metrics.paused("checkpoints"):
            self.save_once(done)
        self.signals.raise_stop()

    def go_back(self, step: int) -> None:
        """Restore the newest checkpoint with a good step after it, and continue with `step`.

        The steps between that checkpoint and `step` are lost, and their data is left out: the run
        ends like a run that never saw it. See optimizer/bad_steps.py.

        Raises: DivergedError if the run has no such checkpoint since it went back, or no more
            steps. Newer checkpoints are deleted: a resumed run would have nothing but bad steps.
        """
        bad_steps = self.metrics.bad_steps
        # If the step right after a checkpoint was bad, the weights of the checkpoint may be bad.
        before = (bad_steps[0]["step"] if bad_steps else step) - 1
        world = self.trainer.engine.world
        with self.metrics.paused("restarts"):
            # The checkpoints before the bad steps may have been deleted for newer ones.
            self.saver.wait()
            oldest = world.on_rank0(lambda: min(checkpoints(self.run)))
            restored = self.saver.load(max(before, oldest))
            last = self.metrics.restored
            is_repeated = last is not None and restored <= last["step"]
            if is_repeated or step == self.config.steps:
                world.on_rank0(lambda: delete_newer(self.run, restored))
                last = last if is_repeated else None
                raise DivergedError(_describe_divergence(bad_steps, step, restored, last))
            what = f"{len(bad_steps)} bad steps in a row" if bad_steps else "weights are not finite"
            console.print(
                f"step {step}: {what}; restored the checkpoint of step {restored}, left out the "
                f"data of steps {restored} to {step - 1}"
            )
            self.metrics.went_back(step, restored)
            self.begin_checkpoint(step)


def _describe_divergence(bad_steps: list[dict], step: int, restored: int, last: dict | None) -> str:
    """Say which steps were bad, and what the run did about them.

    Args:
        restored: the newest checkpoint now.
        last: the return to a checkpoint that did not help; None without one.
    """
    if bad_steps:
        first, newest = bad_steps[0]["step"], bad_steps[-1]["step"]
        steps = f"step {first} was" if first == newest else f"steps {first} to {newest} were"
        # metrics.jsonl has null for a number that is not finite.
        loss, norm = (
            "not finite" if bad_steps[0][name] is None else bad_steps[0][name]
            for name in ("loss", "grad_norm")
        )
        found = (
            f"{steps} bad: loss {loss}, gradient norm {norm}, learning rate "
            f"{bad_steps[0]['lr']:.3g}"
        )
    else:
        found = f"the weights are not finite after {plural(step, 'step')}"
    if last is not None:
        found += (
            f"; the run had left out the data of steps {last['restored']} to {last['step'] - 1} "
            "already"
        )
    return f"{DIVERGED} ({found}; the newest checkpoint is now that of step {restored})"


def _evaluate(
    trainer: Trainer,
    data: TaskData,
    signals: Signals,
    batches: Iterable[TaskBatch],
    advance: Callable[[float], None],
) -> Evaluation | None:
    """Evaluate on held-out data. A signal ends it early. Returns: None without any batch.

    Args: advance: called with the number of rows that are done since the last call.
    """
    world = trainer.engine.world

    def until_signal() -> Iterator[TaskBatch]:
        for batch in batches:
            if signals.received:
                return
            yield batch
            advance(len(batch) * world.data_ranks)

    return data.evaluate(trainer.working, until_signal(), world)


def _report(world: World, advance: Callable[[float], None], amount: float) -> None:
    """Show work of rank 0 on its bar, and the other ranks, which wait, that it does not hang."""
    advance(amount)
    world.mark()
