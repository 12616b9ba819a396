"""tritium train: train a new model, or continue a stopped run."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ...errors import InputError
from ...model import GPTConfig
from ...model.lora import AdapterOptions
from ..config import PART_OF, ExecutionOptions, ReportOptions, TrainConfig
from ..config_file import read_config, to_toml
from ..distributed.launch import (
    Launch,
    join,
)
from ..finetune.tasks import TaskOptions
from ..loop import resume
from ..new_run import new_config
from ..plan import count_tokens
from ..recipes import RECIPES, default_recipe, recipe
from ..run.checkpoint import checkpoints
from ..run.folder import read_run
from ..run.history import CHANGEABLE, FREE, check_changeable
from ._running import run_and_report, run_new
from .cli import parse

_DESCRIPTION = f"""Train a GPT on text. Without a recipe: the best recipe for this machine.


tritium train [RECIPE] [--key value ...]      recipes: {", ".join(RECIPES)}

tritium train --config FILE [--key value ...]         options in TOML, or the config.json of a run

tritium train ... --print-config              print the options as TOML, and do not train

tritium train --resume RUN_DIR                go on with a stopped run, exactly where it stopped

tritium train ... --out RUN_DIR --resume auto         start, or go on if RUN_DIR has a checkpoint


torchrun --nproc-per-node 8 -m tritium.train ...      the same on the 8 GPUs of a machine"""


@dataclass(frozen=True, kw_only=True)
class ModelFlags(GPTConfig):
    """The shape of the model."""

    vocab_size: tyro.conf.Suppress[int] = GPTConfig.vocab_size


@dataclass(frozen=True, kw_only=True)
class TrainFlags(TrainConfig):
    """TrainConfig as flat flags: --n-layer, not --model.n-layer."""

    task: tyro.conf.Suppress[tyro.conf.Fixed[str]] = "pretrain"
    model: tyro.conf.OmitArgPrefixes[ModelFlags]
    adapter: tyro.conf.OmitArgPrefixes[AdapterOptions]
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions]
    report: tyro.conf.OmitArgPrefixes[ReportOptions]
    task_options: tyro.conf.Suppress[TaskOptions]

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
    tokens: str | None = None
    """Tokens to train on, instead of steps: 10B, 500M, 1.5e9, ..."""
    launch: tyro.conf.OmitArgPrefixes[Launch]
    """How the processes that torchrun starts divide the work."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium train`."""
    argv, is_auto = _without_auto(argv)
    is_printed = "--print-config" in argv
    argv = [word for word in argv if word != "--print-config"]
    if argv and argv[0].split("=")[0] == "--resume":
        return _resume(argv)
    if "--resume" in argv:
        raise InputError(
            "--resume RUN_DIR comes first: a resumed run keeps the options it was started with; "
            "--resume auto, with --out, can be anywhere"
        )

    name, config, launch = _parse_new_run(argv)
    if is_printed:
        print(to_toml(config), end="")
        return 0
    out = config.report.out
    if is_auto and not out:
        raise InputError("--resume auto: expected --out with the folder of the run, got none")
    return run_new(name, config, launch, is_auto=is_auto)


def _parse_new_run(argv: Sequence[str]) -> tuple[str, TrainConfig, Launch]:
    """Return the name of the recipe, and the options of a run and its launch."""
    file, argv = _without_config(argv)
    has_recipe = bool(argv) and not argv[0].startswith("-")
    if file is not None and has_recipe:
        raise InputError(
            f"--config: expected a file or the recipe {argv[0]}, got both; write "
            f'recipe = "{argv[0]}" into the file'
        )
    if file is not None:
        base = read_config(file)
        name = file.parent.name if file.name == "config.json" else file.stem
    else:
        name = argv[0] if has_recipe else default_recipe()
        base = recipe(name)
    default = base
    is_micro_batch_given = is_given("--micro-batch-size", argv)
    if is_given("--batch-size", argv) and not is_micro_batch_given:
        default = base.with_options(micro_batch_size=None)  # it may not divide the batch
    options = parse(
        TrainOptions,
        argv[1:] if has_recipe else argv,
        prog="tritium train",
        description=_DESCRIPTION,
        default=TrainOptions(run=TrainFlags.of(default), launch=Launch()),
    )
    before = base.options()
    given = {
        option: value
        for option, value in options.run.options().items()
        if value != before[option] or is_given(f"--{option.replace('_', '-')}", argv)
    }
    if not is_micro_batch_given:
        given.pop("micro_batch_size", None)
    config = new_config(base, given)
    if options.tokens is not None:
        if is_given("--steps", argv):
            raise InputError("--tokens: expected --tokens or --steps, got both; leave one out")
        tokens_per_step = config.batch_size * config.model.context_tokens
        steps = math.ceil(count_tokens("tokens", options.tokens) / tokens_per_step)
        config = config.with_options(steps=steps)
    return name, config, options.launch


def is_given(option: str, argv: Sequence[str]) -> bool:
    """Return whether the words have an option, such as --lr."""
    return any(word.split("=")[0].replace("_", "-") == option for word in argv)


def _without_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file of --config, and the other words."""
    words = "\0".join(argv).replace("--config\0", "--config=").split("\0") if argv else []
    files = [word.partition("=")[2] for word in words if word.split("=")[0] == "--config"]
    if len(files) > 1 or "" in files or "--config" in words:
        raise InputError("--config: expected one file, got " + (" ".join(files) or "none"))
    others = [word for word in words if word.split("=")[0] != "--config"]
    return (Path(files[0]) if files else None), others


# --- a resumed run


def _without_auto(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return the words without `--resume auto`, and whether they had it."""
    text = "\0".join(argv).replace("--resume\0auto", "--resume=auto")
    words = text.split("\0") if argv else []
    return [word for word in words if word != "--resume=auto"], "--resume=auto" in words


_RESUME = f"""Go on with a stopped run. Options that are not given keep their values.


Without --change the result is the same as without the stop: bitwise if the device, the precision,
the micro-batch, the ranks and the other options of the execution are the same, else to rounding.


--change NAME=VALUE changes the result. Names: {", ".join(CHANGEABLE)}.


config.json records each change, with its step, in the list `history`."""


@dataclass(frozen=True, kw_only=True)
class ResumeReport(ReportOptions):
    """The files and messages that the run writes, and how often."""

    out: tyro.conf.Suppress[tyro.conf.Fixed[str | None]] = None


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Options of `tritium train --resume RUN_DIR`."""

    change: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")
    ] = ()
    """Change an option that alters the result, such as lr=1e-4 or steps=2000."""
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions]
    report: tyro.conf.OmitArgPrefixes[ResumeReport]
    launch: tyro.conf.OmitArgPrefixes[Launch]
    """How the processes that torchrun starts divide the work."""


def _resume(argv: Sequence[str]) -> int:
    words = argv[0].split("=", 1) + list(argv[1:])
    if len(words) < 2:
        raise InputError("--resume: expected the folder of a run, or auto, got none")
    run = Path(words[1])
    # Options that are not given keep their recorded values.
    recorded = read_run(run).train if (run / "config.json").is_file() else TrainConfig()
    report = {name: value for name, value in asdict(recorded.report).items() if name != "out"}
    default = ResumeOptions(
        execution=recorded.execution, report=ResumeReport(**report), launch=Launch()
    )
    prog = "tritium train --resume RUN_DIR"
    try:
        options = parse(ResumeOptions, words[2:], prog=prog, description=_RESUME, default=default)
    except InputError as error:
        raise _explain(error, words[2:]) from None
    given = asdict(options.execution) | asdict(options.report)
    before = recorded.options()
    changes = {name: given[name] for name in FREE if given[name] != before[name]}
    changes |= _parse_changes(options.change, prog)
    finished = _finished_at(run, recorded.steps)
    with join(options.launch) as world:
        status = run_and_report(run, world, lambda: resume(run, world, changes))
        has_trained = finished is None or _finished_at(run, recorded.steps) != finished
        if world.is_rank0 and not has_trained and "steps" not in changes:
            print(
                f"{run}: all {recorded.steps} steps were done before; to train on, give "
                f"--change steps=N with N above {recorded.steps}",
                file=sys.stderr,
            )
        return status


def _finished_at(run: Path, steps: int) -> int | None:
    """Return when the last checkpoint of a run was written, in nanoseconds; None without it."""
    folder = checkpoints(run).get(steps)
    return folder and folder.stat().st_mtime_ns


def _explain(error: InputError, words: Sequence[str]) -> InputError:
    """Return a better error, or raise it, if an option is one of a new run."""
    for word in words:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in CHANGEABLE:
            return InputError(
                f"--{word[2:].split('=')[0]}: expected --change {name}=VALUE for a resumed run, "
                "because it changes the result"
            )
        if word.startswith("--") and name in PART_OF and name not in FREE:
            check_changeable(name)
    return error


def _parse_changes(words: Sequence[str], prog: str) -> dict[str, Any]:
    """Parse NAME=VALUE words with the types of the options."""
    types = {each.name: each.type for each in fields(TrainConfig)}
    given = {}
    flags = []
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise InputError(f"--change: expected NAME=VALUE, such as lr=1e-4, got {word!r}")
        if name in FREE:
            raise InputError(f"--change: expected --{name.replace('_', '-')} {value} instead")
        check_changeable(name)
        given[name] = types[name]
        if name == "data":
            flags += ["--data", *_split_paths(value)]
        else:
            flags.append(f"--{name.replace('_', '-')}={value}")
    if not flags:
        return {}
    changes = make_dataclass("Changes", given.items(), kw_only=True)
    return asdict(parse(changes, flags, prog=prog, description=""))


def _split_paths(text: str) -> list[str]:
    """Split several paths, which can have quotes, as a shell does."""
    try:
        paths = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--change data: expected paths, got {text!r} ({error})") from None
    if not all(paths):
        raise InputError(f"--change data: expected paths, got {text!r}")
    return paths
