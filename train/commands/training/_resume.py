"""tritium train --resume RUN_DIR: continue a stopped run."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ....errors import InputError
from ...config import PART_OF, ExecutionOptions, ReportOptions, TrainConfig
from ...distributed.launch import join
from ...loop import resume
from ...machine.options import Launch
from ...run.checkpoint import checkpoints
from ...run.folder import read_run
from ...run.history import CHANGEABLE, FREE, check_changeable
from ..cli import parse
from ._running import run_and_report

_RESUME = f"""Continue a stopped run. Options that you do not give keep their values.


Without --change, the result is the same as without the stop. It is bitwise the same if the
execution options, such as device, precision, micro-batch and ranks, do not change. Otherwise it is
the same up to rounding.


--change NAME=VALUE changes an option that affects the result: {", ".join(CHANGEABLE)}.


config.json records each change and its step in the list `history`."""


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
    """Change an option that affects the result, such as lr=1e-4 or steps=2000."""
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions]
    report: tyro.conf.OmitArgPrefixes[ResumeReport]
    launch: tyro.conf.OmitArgPrefixes[Launch]
    """How the processes of torchrun divide the work."""


def resume_run(argv: Sequence[str]) -> int:
    """Run `tritium train --resume RUN_DIR`."""
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
                f"{run}: all {recorded.steps} steps were already done; to train longer, give "
                f"--change steps=N with N above {recorded.steps}",
                file=sys.stderr,
            )
        return status


def _finished_at(run: Path, steps: int) -> int | None:
    """Return when the last checkpoint of a run was written, in nanoseconds; None without it."""
    folder = checkpoints(run).get(steps)
    return folder and folder.stat().st_mtime_ns


def _explain(error: InputError, words: Sequence[str]) -> InputError:
    """Return or raise an error that names an option that a resumed run cannot take.

    Returns: `error` if there is no such option.
    """
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
