"""tritium train: train a new model, or continue a stopped run."""

import math
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import tyro

from ...errors import DivergedError, InputError, InterruptedRun, NoMemoryError
from ...model import GPTConfig
from ...model.cost import parameters
from ..config import ExecutionOptions, ReportOptions, TrainConfig
from ..distributed.launch import Launch, join
from ..distributed.world import World
from ..evaluate import Evaluation
from ..loop import resume, start
from ..recipes import RECIPES, default_recipe, recipe
from ..run.folder import read_run
from ..run.metrics import console, describe_goodput
from ..run.models import open_model
from .cli import is_out_of_memory, parse, program
from .plan import what_fits

_DESCRIPTION = f"""Train a GPT on text. Without a recipe: the best recipe for this machine.


tritium train [RECIPE] [--key value ...]      recipes: {", ".join(RECIPES)}

tritium train --resume RUN_DIR                go on with a stopped run, exactly where it stopped


torchrun --nproc-per-node 8 -m tritium.train ...      the same on the 8 GPUs of a machine"""


@dataclass(frozen=True, kw_only=True)
class ModelFlags(GPTConfig):
    """The shape of the model."""

    vocab_size: tyro.conf.Suppress[int] = GPTConfig.vocab_size


@dataclass(frozen=True, kw_only=True)
class TrainFlags(TrainConfig):
    """TrainConfig as flat flags: --n-layer, not --model.n-layer."""

    model: tyro.conf.OmitArgPrefixes[ModelFlags]
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions]
    report: tyro.conf.OmitArgPrefixes[ReportOptions]

    @classmethod
    def of(cls, config: TrainConfig) -> "TrainFlags":
        """Return the flags whose defaults are `config`."""
        values = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
        return cls(**values | {"model": ModelFlags(**asdict(config.model))})

    def config(self) -> TrainConfig:
        """Return the configuration that the flags describe."""
        return TrainConfig.from_options(**self.options())


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `tritium train`."""

    run: tyro.conf.OmitArgPrefixes[TrainFlags]
    """The experiment: data, batch, optimizer and learning rate."""
    launch: tyro.conf.OmitArgPrefixes[Launch]
    """How the processes that torchrun starts divide the work."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium train`."""
    if argv and argv[0].split("=")[0] == "--resume":
        return _resume(argv)
    if "--resume" in argv:
        raise InputError(
            "--resume RUN_DIR comes first: a resumed run keeps the options it was started with"
        )

    # options
    has_recipe = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if has_recipe else default_recipe()
    base = recipe(name)
    micro_batch = base.execution.micro_batch_size
    if _is_given("--batch-size", argv) and not _is_given("--micro-batch-size", argv):
        base = base.with_options(micro_batch_size=None)  # it may not divide the batch
    default = TrainOptions(run=TrainFlags.of(base), launch=Launch())
    words = argv[1:] if has_recipe else argv
    options = parse(
        TrainOptions, words, prog="tritium train", description=_DESCRIPTION, default=default
    )
    config = options.run.config()
    if config.execution.micro_batch_size is None and micro_batch is not None:
        config = config.with_options(micro_batch_size=math.gcd(micro_batch, config.batch_size))
    is_dataset = (Path(config.data[0]) / "dataset.json").is_file()
    if is_dataset and not _is_given("--tokenizer", argv):
        # A dataset has its own tokenizer. The recipe's tokenizer is for the recipe's data.
        config = replace(config, tokenizer=None)
    if config.init_from is not None:
        config = _start_from(config, default.run.model, argv)

    # run
    with join(options.launch) as world:
        out = config.report.out
        run = world.on_rank0(lambda: Path(out) if out else _next_free_folder(name))
        if world.is_rank0:
            print(f"{name}: training into {run}; watch {run / 'metrics.jsonl'}")
            _print_unused_gpus(world, config)
        return _run_and_report(run, world, lambda: start(config, run, world))


def _is_given(option: str, argv: Sequence[str]) -> bool:
    return any(word.split("=")[0].replace("_", "-") == option for word in argv)


def _resume(argv: Sequence[str]) -> int:
    words = argv[0].split("=", 1) + list(argv[1:])
    if len(words) < 2:
        raise InputError("--resume: expected the folder of a run, got none")
    run = Path(words[1])
    try:
        launch = parse(
            Launch, words[2:], prog="tritium train --resume RUN_DIR", description=_DESCRIPTION
        )
    except InputError as error:
        raise InputError(
            "--resume RUN_DIR: expected only options of the launch after it (--parallel, "
            f"--shard-ranks, --tensor-parallel): {error}"
        ) from None
    with join(launch) as world:
        return _run_and_report(run, world, lambda: resume(run, world))


def _start_from(config: TrainConfig, default: GPTConfig, argv: Sequence[str]) -> TrainConfig:
    """Give the run the shape and the tokenizer of the model that it starts from."""
    trained = open_model(Path(config.init_from))
    shape = trained.config.with_dropout_of(config.model)
    for each in fields(shape):
        given, expected = getattr(config.model, each.name), getattr(shape, each.name)
        if given not in (expected, getattr(default, each.name)):
            raise InputError(
                f"{each.name}: expected {expected}, as in {config.init_from}, got {given}; "
                "leave it out"
            )
    has_tokenizer = _is_given("--tokenizer", argv)
    if trained.tokenizer_path is None and config.tokenizer is not None and not has_tokenizer:
        raise InputError(
            f"--tokenizer: expected the tokenizer of {config.init_from}, which has "
            f"{trained.config.vocab_size} tokens, got none; the model came without one"
        )
    if trained.tokenizer_path is not None and config.tokenizer is not None and not has_tokenizer:
        config = replace(config, tokenizer=str(trained.tokenizer_path))
    return replace(config, model=shape)


def _next_free_folder(name: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def _print_unused_gpus(world: World, config: TrainConfig) -> None:
    count = torch.cuda.device_count()
    if not world.is_distributed and count > 1 and config.execution.device in ("auto", "cuda"):
        print(
            f"training on 1 of {count} GPUs; to use all: torchrun --nproc-per-node {count} "
            "-m tritium.train with the same options"
        )


def _run_and_report(run: Path, world: World, work: Callable[[], Evaluation]) -> int:
    """Train, then print a sample, the evaluation and what to do next. Returns: the exit status."""
    began = time.perf_counter()
    console.quiet = not world.is_rank0
    try:
        result = work()
    except InterruptedRun as stop:
        if world.is_rank0:
            print(_describe_stop(run, world))
        return _stop_status(run, stop)
    except DivergedError as error:
        lower = f"--change lr={read_run(run).train.lr / 2:g}"
        raise InputError(f"{error}; go on with: {_resume_command(run, world)} {lower}") from error
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
    if any((run / "checkpoints").glob("step-*")):
        return f"stopped; go on with: {_resume_command(run, world)}"
    return "stopped before the first step; nothing is saved"


def _stop_status(run: Path, stop: InterruptedRun) -> int:
    """Return the exit status of a stopped run."""
    if (run / "config.json").exists():
        status = read_run(run).train.execution.stop_status
        if status is not None:
            return status
    return 0 if stop.number == getattr(signal, "SIGALRM", None) else 128 + stop.number


def _print_result(run: Path, result: Evaluation, seconds: float) -> None:
    record = read_run(run)
    samples = (run / "samples.txt").read_text(encoding="utf-8")
    last_sample = samples.rsplit("--- step ", 1)[-1].split("\n", 1)[-1]
    prompt = shlex.quote(record.train.prompt or "Once")
    print(f"\n{last_sample}")
    print(
        f"validation loss {result.loss:.4f} nats per token over all {result.tokens:,} held-out "
        f"tokens: perplexity {result.perplexity:.2f}, {result.bits_per_byte:.3f} bits per byte"
    )
    print(
        f"{parameters(record.model):,} parameters, {seconds:.0f} s; loss curve: {run / 'loss.png'}"
    )
    print(f"goodput: {describe_goodput(run)}")
    print(f"next: {program()} sample {shlex.quote(str(run))} --prompt {prompt}")
    print(f"      for a better model, the same command with --steps {4 * record.train.steps}")
