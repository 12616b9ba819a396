"""Run a training and report its result: what `tritium train` and `tritium finetune` share."""

import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ....errors import DivergedError, InputError, InterruptedRun, NoMemoryError, plural
from ....model.cost import parameters
from ...config import TrainConfig
from ...distributed.launch import (
    is_restarted,
    join,
    remember_folder,
    remembered_folder,
    stop_status,
)
from ...distributed.world import World
from ...evaluate import Evaluation
from ...loop import resume, start
from ...machine.options import Launch
from ...run.checkpoint import checkpoints
from ...run.folder import create_free_folder, is_unstarted, read_run, remove_unused_folder
from ...run.history import changes_between
from ...run.metrics import describe_goodput
from ...run.samples import last_sample
from ...run.signals import TIME_LIMIT
from ...tasks import TASKS
from ...terminal.progress import console
from ..cli import is_out_of_memory, program
from ._plan_text import what_fits


def run_new(name: str, config: TrainConfig, launch: Launch, *, is_auto: bool = False) -> int:
    """Train a new run, or continue it after a restart by torchrun. Returns: the exit status.

    Args:
        name: of the recipe or the task, for the name of the folder.
        is_auto: whether to continue if the folder of the run has a checkpoint.
    """
    out = config.report.out
    with join(launch) as world:
        run = world.on_rank0(
            lambda: Path(out) if out else remembered_folder() or create_free_folder(name)
        )
        remember_folder(run)
        if (is_auto or is_restarted()) and world.on_rank0(lambda: _has_checkpoint(run)):
            record = world.on_rank0(lambda: read_run(run))
            # The options of other tasks follow from their data.
            is_pretraining = config.task == "pretrain"
            changes = changes_between(run, record.train, config) if is_pretraining else {}
            return run_and_report(run, world, lambda: resume(run, world, changes))

        def announce() -> None:
            # Flushed, because a log file would otherwise show it after the messages of the run.
            print(f"{name}: training into {run}; watch {run / 'metrics.jsonl'}", flush=True)
            _print_unused_gpus(world, config)

        try:
            return run_and_report(
                run, world, lambda: start(config, run, world, on_claimed=announce)
            )
        finally:
            if not out and world.is_rank0:
                remove_unused_folder(run)


def _has_checkpoint(run: Path) -> bool:
    return (run / "config.json").is_file() and not is_unstarted(run)


def _print_unused_gpus(world: World, config: TrainConfig) -> None:
    count = torch.cuda.device_count()
    if not world.is_distributed and count > 1 and config.execution.device in ("auto", "cuda"):
        print(
            f"training on 1 of {count} GPUs; to use all: torchrun --nproc-per-node {count} "
            "-m tritium.train with the same options"
        )


def run_and_report(run: Path, world: World, work: Callable[[], Evaluation]) -> int:
    """Train, then print a sample, the evaluation and what to do next. Returns: the exit status."""
    began = time.perf_counter()
    console.quiet = not world.is_rank0
    try:
        result = work()
    except InterruptedRun as stop:
        if world.is_rank0:
            print(_describe_stop(run, world))
        return stop_status(_stop_status(run, stop))
    except DivergedError as error:
        lower = f"--change lr={min(read_run(run).train.lr / 2, 0.01):g}"
        hint = f"continue with: {_resume_command(run, world)} {lower}"
        raise InputError(f"{error}; {hint}") from error
    except Exception as error:
        # If only one rank runs out of memory, the others wait for it until torchrun ends them.
        if is_out_of_memory(error) and (run / "config.json").exists():
            raise NoMemoryError(what_fits(read_run(run), world)) from error
        raise
    if world.is_rank0:
        _print_result(run, result, time.perf_counter() - began)
    return 0


def _resume_command(run: Path, world: World) -> str:
    command = "torchrun ... -m tritium.train" if world.is_distributed else f"{program()} train"
    return f"{command} --resume {shlex.quote(str(run))}"


def _describe_stop(run: Path, world: World) -> str:
    if checkpoints(run):
        return f"stopped; continue with: {_resume_command(run, world)}"
    return "stopped before the first step; nothing is saved"


def _stop_status(run: Path, stop: InterruptedRun) -> int:
    """Return the exit status of a stopped run."""
    if (run / "config.json").exists():
        status = read_run(run).train.execution.stop_status
        if status is not None:
            return status
    return 0 if stop.number == TIME_LIMIT else 128 + stop.number


def _print_result(run: Path, result: Evaluation, seconds: float) -> None:
    record = read_run(run)
    command = f"{program()} {{}} {shlex.quote(str(run))}"
    sample = last_sample(run)
    print(f"\n{sample}" if sample else "")
    print(f"{result.describe()}, over all {plural(result.tokens, f'held-out {result.unit}')}")
    print(
        f"{parameters(record.model):,} parameters, {seconds:.0f} s; loss curve: {run / 'loss.png'}"
    )
    print(f"goodput: {describe_goodput(run)}")
    if record.train.task != "pretrain":
        print(f"next: {command.format(TASKS[record.train.task].next_command)}")
        return
    prompt = record.train.prompt or _two_words(sample)
    option = f" --prompt {shlex.quote(prompt)}" if prompt else ""
    print(f"next: {command.format('sample')}{option}")
    steps = 4 * max(record.train.steps, record.train.warmup_steps)
    print(f"      for a better model, a new run with --steps {steps}")


def _two_words(text: str) -> str:
    """Return the first two words that a space separates; "" if there are none.

    The words of a sample fit the data of the run, whether it is prose or code.
    """
    found = re.search(r"(?<=\s)[^\W\d_]\w* \w+", text)
    return found[0] if found else ""
