"""The training loop, from a configuration to a trained model.

A run is a folder: config.json (all that is needed to repeat it), tokenizer.json, metrics.jsonl,
samples.txt, loss.png, checkpoints/step-N. On one CPU, the weights of a resumed run are bitwise
equal to the weights of a run that never stopped.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..model import GPT
from ..model.cost import check_size, flops_per_token
from .config import TrainConfig
from .data.prefetch import Prefetch
from .distributed.engines import SingleProcess
from .distributed.world import SINGLE_PROCESS, World
from .eval.in_training import open_evaluations
from .evaluate import Evaluation
from .execution import Execution, resolve
from .finetune.data import TaskData
from .machine.device import choose_matmul, keep_freed_memory
from .machine.threads import limit_threads
from .optim import Optimizer
from .run.checkpoint import newest_checkpoint
from .run.folder import (
    RunRecord,
    check_folder_unused,
    claim_folder,
    is_unstarted,
    only_writer,
    read_run,
)
from .run.goodput import process_age
from .run.history import note_resume, with_changes
from .run.metrics import Metrics
from .run.profile import check_profile_steps
from .run.saver import CheckpointSaver, check_space_for_run
from .run.signals import Signals, set_time_limit, stop_on_signals
from .run.trackers import (
    NO_CALLBACKS,
    Callbacks,
    CallbackTracker,
    Tracker,
    check_trackers,
    open_trackers,
)
from .schedule import check_learning_rates, describe_long_warmup
from .session import Session
from .start.initial_model import initial_model, new_model
from .tasks import TASKS
from .terminal.progress import console, progress
from .trainer import Trainer, quiet_collector


@stop_on_signals()
def start(
    config: TrainConfig,
    run: Path,
    world: World = SINGLE_PROCESS,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
    on_claimed: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Train a new model. Rank 0 writes the folder `run`, and calls the callbacks.

    Args: on_claimed: called on rank 0 after the data is read and config.json is written.
    Returns: the evaluation of the finished model on all held-out text.
    Raises: InputError if the folder is in use, the data is bad, options do not fit together or the
        training diverges; InterruptedRun after a signal or `max_minutes`.
    """
    world.on_rank0(lambda: check_folder_unused(run))
    check_learning_rates(config)
    execution = _resolve_on_all_ranks(config, world)
    check_profile_steps(config)
    open_data = TASKS[config.task].code.open_data
    data = world.on_each_node(lambda: open_data(config, progress=world.is_rank0))
    config = data.fit(config)
    console.print(data.describe(config))
    if warning := describe_long_warmup(config):
        console.print(warning)
    # Read the model to start from before anything is written: it may be damaged.
    with progress("initial weights"):
        model = world.run_on_all_ranks(lambda: initial_model(config, data))
    with only_writer(run, world) as check_folder:
        summary = execution.summary()
        world.on_rank0(lambda: claim_folder(run, config, model.config, data, summary))
        world.on_rank0(on_claimed)
        return _train(config, run, model, data, execution, check_folder, callbacks, None)


@stop_on_signals()
def resume(
    run: Path,
    world: World = SINGLE_PROCESS,
    changes: dict[str, Any] | None = None,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Evaluation:
    """Continue a stopped run from its newest checkpoint. Returns and Raises: see `start`.

    Args:
        changes: new values of options, by their flat names. history.py has the names. Without
            changes the result is that of a run that never stopped.
    """
    record = world.on_rank0(lambda: read_run(run))
    config = with_changes(run, record.train, changes or {})
    if world.on_rank0(lambda: is_unstarted(run)):
        return start(config, run, world, callbacks=callbacks)
    with only_writer(run, world) as check_folder:
        world.on_rank0(lambda: newest_checkpoint(run))
        files = run / "checkpoints"
        world.on_rank0(lambda: check_size(files, record.model, bytes_per_parameter=4))
        execution = _resolve_on_all_ranks(config, world)
        check_profile_steps(config)
        options = {"record": record, "run": run, "progress": world.is_rank0}
        open_data = TASKS[config.task].code.open_data
        data = world.on_each_node(lambda: open_data(config, **options))
        # tokenizer.json may be missing or changed. The data has the tokenizer of the run.
        world.on_rank0(lambda: data.tokenizer.save(run / "tokenizer.json"))
        # The model it started from may be gone. The checkpoint has all weights.
        model = new_model(config, data, record.model)
        return _train(config, run, model, data, execution, check_folder, callbacks, record)


# --- before the first step


def _resolve_on_all_ranks(config: TrainConfig, world: World) -> Execution:
    if config.execution.max_minutes is not None:
        set_time_limit(60 * config.execution.max_minutes - process_age())

    def resolved() -> Execution:
        check_trackers(config)
        return resolve(config, world)

    execution = world.run_on_all_ranks(resolved)
    world.check_same_on_all_ranks("device", execution.device.type)
    return execution


def _train(
    config: TrainConfig,
    run: Path,
    model: GPT,
    data: TaskData,
    execution: Execution,
    check_folder: Callable[[], None],
    callbacks: Callbacks,
    record: RunRecord | None,
) -> Evaluation:
    """Train a new run (`record` is None), or from the newest checkpoint of a recorded one."""
    world = execution.world
    world.check_same_on_all_ranks(
        "data", (data.tokenizer.sha256[:12], len(data.train), len(data.val))
    )
    limit_threads()
    choose_matmul(execution.device)
    keep_freed_memory()

    # The model and its optimizer.
    with progress("preparing the first step"):
        engine = execution.engine(model.to(execution.device), execution)
        optimizer = Optimizer(engine, config)
        saver = CheckpointSaver(run, engine, optimizer, config.report)
        if record is None:
            first = 0
            _save_first(config, run, engine, saver)
        else:
            first = saver.load()
            world.on_rank0(lambda: check_space_for_run(run, config, engine))

    # The data, and the metrics of its steps.
    data.begin(run, engine, config, first)
    if record is not None:  # after all that may raise for changed options
        world.on_rank0(lambda: note_resume(run, record, config, data, execution, first))
    loader = data.loader(config, execution)
    signals = Signals(world)
    trackers = open_trackers(config, run, first) if world.is_rank0 else []
    if world.is_rank0:
        trackers.append(CallbackTracker(callbacks, signals.request_stop))
    metrics = _open_metrics(config, run, engine, loader.context_tokens, first, trackers)
    if execution.is_compiled:
        console.print("compiling the model: the first step takes longer if it is not in the cache")

    # The steps.
    evaluations = world.on_each_node(lambda: open_evaluations(config, data.tokenizer))
    trainer = Trainer(engine, optimizer, seed=config.seed)
    with (
        metrics,
        signals,
        quiet_collector(),
        Prefetch(loader.batch, first) as batches,
        saver,
    ):
        state = (trainer, saver, metrics, signals, check_folder, evaluations)
        return Session(config, run, data, *state).run_steps(first, loader, batches)


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
    config: TrainConfig,
    run: Path,
    engine: SingleProcess,
    row_tokens: int,
    first: int,
    trackers: Sequence[Tracker],
) -> Metrics:
    world = engine.world
    return Metrics(
        run,
        start=first,
        steps=config.steps,
        tokens_per_step=config.batch_size * row_tokens,
        flops_per_token=flops_per_token(engine.model.config, row_tokens, config.adapter),
        device=engine.execution.device,
        compiles=engine.execution.is_compiled or engine.execution.device.type == "cuda",
        world=world,
        log_interval=config.report.log_interval,
        trackers=trackers,
    )
