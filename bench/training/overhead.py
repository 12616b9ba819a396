"""tritium bench overhead: what checkpoints and the check for bad steps cost a run.

    checkpoint    Rounds of steps with and without a checkpoint in the background, in turn. A round
                  ends when the checkpoint is written. The cost is the median difference of two
                  rounds next to each other, divided by the time of the steps between two
                  checkpoints of a run.
    judgement     Single steps with and without StepJudge, in turn: the ratio of their medians; and
                  the fraction of a step that is spent in StepJudge.
    memory        Growth of the process's largest memory because of the first checkpoint in the
                  background, and the size of its buffer. Both are divided by the size of weights
                  and optimizer state.

Wall time counts other programs on the machine too. CPU time, of all threads of this process, does
not. Both are shown. The data is random tokens.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import check_positive
from ...model import GPT
from ...model.cost import parameters
from ...train.commands.cli import parse
from ...train.config import TrainConfig
from ...train.data.tokenizers.tokenizer import vocab_size_of
from ...train.execution import resolve
from ...train.machine.device import choose_matmul, keep_freed_memory
from ...train.recipes import RECIPES, recipe
from ...train.run.saver import CheckpointSaver, checkpoint_bytes
from ...train.trainer import Trainer, single_trainer
from ..record import check_writable, describe_provenance, provenance, write_record
from .training import random_batch

# Drawn before the clock starts, and used in turn.
_BATCHES = 8
HELP = f"""Measure the cost of checkpoints and of the check for bad steps, on a CPU.


tritium bench overhead [RECIPE] [--key value ...]      recipes: {", ".join(RECIPES)}"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `tritium bench overhead`."""

    rounds: int = 10
    """Pairs of rounds, with and without a checkpoint."""
    steps: int = 5
    """Steps per round; also a tenth of the steps that are timed with and without the judgement."""
    checkpoint_interval: int = 200
    """Steps between checkpoints of the run whose cost is computed."""
    folder: str | None = None
    """Where checkpoints are written. None: the folder for temporary files."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""

    def __post_init__(self):
        check_positive(self, "rounds", "steps", "checkpoint_interval")


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench overhead`. Returns: exit status."""
    has_recipe = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if has_recipe else "laptop"
    config = recipe(name).with_options(device="cpu")
    options = parse(Options, argv[has_recipe:], prog="tritium bench overhead", description=HELP)
    out = check_writable(options.out)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = {"recipe": name, **measure(config, options, Path(folder))}
    print(_describe(provenance() | figures))
    if out:
        write_record(out, "overhead", figures)
    return 0


def measure(config: TrainConfig, options: Options, folder: Path) -> dict[str, Any]:
    """Train with and without each part, and return the figures of the record."""
    execution = resolve(config)
    choose_matmul(execution.device)
    keep_freed_memory()
    shape = config.gpt(vocab_size_of(config.tokenizer))
    trainer = single_trainer(GPT(shape), config)
    batches = [random_batch(config, shape, number) for number in range(_BATCHES)]

    def step(number: int) -> None:
        trainer.backward(batches[number % _BATCHES], step=number)
        trainer.update(config.lr)

    for number in range(3):
        step(number)
    report = replace(config.report, keep_checkpoints=1)
    saver = CheckpointSaver(folder, trainer.engine, trainer.optimizer, report)
    size = checkpoint_bytes(config, trainer.engine)
    memory = _measure_memory(saver, step, size)
    judgement = _measure_judgement(trainer, step, options)
    checkpoint = _measure_checkpoint(saver, step, options)
    return {
        "parameters": parameters(shape),
        "checkpoint_interval": options.checkpoint_interval,
        "checkpoint": checkpoint,
        "judgement": judgement,
        "memory": memory,
    }


def _clock() -> tuple[float, float]:
    """Return seconds of wall time and of CPU time."""
    return time.perf_counter(), time.process_time()


@contextlib.contextmanager
def _timed(samples: list[tuple[float, float]]) -> Iterator[None]:
    wall, cpu = _clock()
    yield
    later_wall, later_cpu = _clock()
    samples.append((later_wall - wall, later_cpu - cpu))


def _measure_checkpoint(
    saver: CheckpointSaver, step: Callable[[int], None], options: Options
) -> dict[str, float]:
    """Return the cost of a checkpoint as fractions of the time between two checkpoints."""
    rounds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    before = saver.stall_seconds
    for number in range(options.rounds):
        for has_checkpoint in (True, False) if number % 2 else (False, True):
            with _timed(rounds[has_checkpoint]):
                if has_checkpoint:
                    saver.save(number + 1, background=True)
                for i in range(options.steps):
                    step(i)
                if has_checkpoint:
                    saver.wait()
    stall = (saver.stall_seconds - before) / options.rounds
    found = {"stall_seconds": stall}
    for clock, index in (("wall", 0), ("cpu", 1)):
        pairs = zip(rounds[True], rounds[False], strict=True)
        extra = statistics.median(one[index] - other[index] for one, other in pairs)
        one_step = statistics.median(each[index] for each in rounds[False]) / options.steps
        found[f"step_{clock}_seconds"] = one_step
        found[f"checkpoint_{clock}_seconds"] = extra
        found[f"{clock}_fraction"] = extra / (options.checkpoint_interval * one_step)
    return found


def _measure_judgement(
    trainer: Trainer, step: Callable[[int], None], options: Options
) -> dict[str, float]:
    """Return the cost of the judgement as fractions of a step."""
    judge = trainer.optimizer.judge
    parts = (judge.is_bad, judge.count_step)
    inside: list[tuple[float, float]] = []
    never = torch.zeros((), dtype=torch.bool)

    def timed(loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        with _timed(inside):
            found = parts[0](loss, grad_norm)
            parts[1]()
            return found

    steps: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for number in range(10 * options.steps):
        for is_judged in (True, False) if number % 2 else (False, True):
            judge.is_bad = timed if is_judged else lambda loss, grad_norm: never
            judge.count_step = lambda: None
            with _timed(steps[is_judged]):
                step(number)
    judge.is_bad, judge.count_step = parts
    found = {}
    for clock, index in (("wall", 0), ("cpu", 1)):
        judged, plain = (statistics.median(each[index] for each in steps[x]) for x in (True, False))
        found[f"{clock}_ratio"] = judged / plain
        found[f"{clock}_fraction"] = statistics.mean(each[index] for each in inside) / plain
    return found


def _measure_memory(
    saver: CheckpointSaver, step: Callable[[int], None], size: int
) -> dict[str, float]:
    """Return the growth of the largest memory by a checkpoint, as a fraction of its size."""
    step(0)
    _forget_largest_memory()
    step(1)
    before = _largest_memory()
    saver.save(0, background=True)
    step(2)
    saver.wait()
    return {
        "bytes": size,
        "growth_fraction": (_largest_memory() - before) / size,
        "buffer_fraction": saver.buffer_bytes / size,
    }


def _forget_largest_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _largest_memory() -> int:
    """Return the largest resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _describe(record: dict[str, Any]) -> str:
    """Return the figures as a table in Markdown, and two sentences."""
    checkpoint = record["checkpoint"]
    judgement = record["judgement"]
    memory = record["memory"]
    interval = record["checkpoint_interval"]
    rows = [
        ["", "wall time", "CPU time"],
        ["---"] * 3,
        _row("a step", checkpoint, "step_{}_seconds", ".3f", " s"),
        _row("a checkpoint in the background", checkpoint, "checkpoint_{}_seconds", ".3f", " s"),
        _row(f"the same, every {interval} steps", checkpoint, "{}_fraction", ".2%"),
        _row("judgement, measured inside a step", judgement, "{}_fraction", ".3%"),
        _row("steps with / without judgement", judgement, "{}_ratio", ".4f"),
    ]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    title = f"{record['recipe']}, {record['parameters']:,} parameters"
    return (
        f"{title}; {describe_provenance(record)}\n\n{table}\n"
        f"The steps wait {checkpoint['stall_seconds'] * 1e3:.0f} ms per checkpoint of "
        f"{memory['bytes'] / 1e6:.0f} MB. The process grew by {memory['growth_fraction']:.2f} of "
        f"this size; the buffer has {memory['buffer_fraction']:.2f} of it."
    )


def _row(title: str, figures: dict[str, float], key: str, spec: str, unit: str = "") -> list[str]:
    return [title, *(f"{figures[key.format(clock)]:{spec}}{unit}" for clock in ("wall", "cpu"))]
