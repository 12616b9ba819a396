"""tritium train: train a new model, or continue a stopped run."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from ....errors import InputError
from ....model.config import AdapterOptions, GPTConfig
from ...config import ExecutionOptions, ReportOptions, TrainConfig
from ...machine.options import Launch
from ...recipes import RECIPES, default_recipe, likely_default_recipe, recipe
from ...tasks import TaskOptions
from ...terminal.console import loading
from ..cli import is_help, parse

_DESCRIPTION = f"""Train a GPT on text. Without a RECIPE, the best recipe for this machine is used. The defaults below are those of {{base}}.


tritium train [RECIPE] [--key value ...]      recipes: {", ".join(RECIPES)}

tritium train --config FILE [--key value ...]         options in TOML, or the config.json of a run

tritium train ... --print-config              print the options as TOML, and do not train

tritium train --resume RUN_DIR                continue a stopped run exactly where it stopped

tritium train ... --out RUN_DIR --resume auto         start, or continue if RUN_DIR has a checkpoint


torchrun --nproc-per-node 8 -m tritium.train ...      the same on 8 GPUs"""  # noqa: E501 - --help keeps line breaks


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
    """LoRA: train small matrices while the weights of the model are frozen."""
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions]
    report: tyro.conf.OmitArgPrefixes[ReportOptions]
    task_options: tyro.conf.Suppress[TaskOptions]

    @classmethod
    def of(cls, config: TrainConfig) -> "TrainFlags":
        """Return the flags whose defaults are `config`."""
        values = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
        return cls(**values | {"model": ModelFlags(**asdict(config.model))})


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `tritium train`."""

    run: tyro.conf.OmitArgPrefixes[TrainFlags]
    """Data, batch size, optimizer and learning rate."""
    tokens: str | None = None
    """Tokens to train on, instead of steps: 10B, 500M, 1.5e9, ..."""
    launch: tyro.conf.OmitArgPrefixes[Launch]
    """How the processes of torchrun divide the work."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium train`."""
    argv, is_auto = _without_auto(argv)
    is_printed = "--print-config" in argv
    argv = [word for word in argv if word != "--print-config"]
    if argv and argv[0].split("=")[0] == "--resume":
        if is_printed:
            raise InputError(
                "--print-config: expected a new run, got --resume RUN_DIR; `tritium train --config "
                "RUN_DIR --print-config` prints the options of a run"
            )
        with loading(is_quiet=is_help(argv)):
            from ._resume import resume_run

        return resume_run(argv)
    if "--resume" in argv:
        raise InputError(
            "--resume RUN_DIR comes first: a resumed run keeps the options it was started with; "
            "--resume auto, with --out, can be anywhere"
        )

    with loading(is_quiet=is_help(argv)):
        name, config, launch = _parse_new_run(argv)
    if is_printed:
        from ...start.config_file import to_toml

        print(to_toml(config), end="")
        return 0
    out = config.report.out
    if is_auto and not out:
        raise InputError("--resume auto: expected --out with the folder of the run, got none")
    # The help is printed by now. The import of PyTorch takes seconds.
    with loading():
        from ._running import run_new

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
        from ...start.config_file import read_config

        base = read_config(file)
        name = file.parent.name if file.name == "config.json" else file.stem
        described = str(file)
    else:
        default_name = likely_default_recipe if is_help(argv) else default_recipe
        name = argv[0] if has_recipe else default_name()
        base = recipe(name)
        described = f"the recipe {name}"
    default = base
    is_micro_batch_given = is_given("--micro-batch-size", argv)
    if is_given("--batch-size", argv) and not is_micro_batch_given:
        default = base.with_options(micro_batch_size=None)  # it may not divide the batch
    options = parse(
        TrainOptions,
        argv[1:] if has_recipe else argv,
        prog="tritium train",
        description=_DESCRIPTION.format(base=described),
        default=TrainOptions(run=TrainFlags.of(default), launch=Launch()),
    )
    from ...plan import count_tokens
    from ...start.new_run import new_config

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
    files = []
    others = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--config":
            files.append(value if equals else next(words, ""))
        else:
            others.append(word)
    if len(files) > 1 or "" in files:
        raise InputError("--config: expected one file, got " + (" ".join(files) or "none"))
    return (Path(files[0]) if files else None), others


def _without_auto(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return the words without `--resume auto`, and whether they had it."""
    words = []
    for word in argv:
        if word == "auto" and words[-1:] == ["--resume"]:
            words[-1] = "--resume=auto"
        else:
            words.append(word)
    return [word for word in words if word != "--resume=auto"], "--resume=auto" in words
