"""tritium plot: several runs in one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...errors import InputError
from ..choices import AXES
from .cli import parse

_DESCRIPTION = "Draw loss, learning rate, gradient norm and throughput of runs in one picture."


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Options of `tritium plot`."""

    runs: tyro.conf.Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
        ]
    ]
    """Folders of runs."""
    out: str = "runs.png"
    """File to write: .png, .svg, .pdf, ... An existing file is replaced."""
    x: Literal[tuple(AXES)] = "steps"
    """Horizontal axis. seconds: time of the steps, without evaluations and checkpoints."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium plot`."""
    options = parse(PlotOptions, argv, prog="tritium plot", description=_DESCRIPTION)
    from ..run.comparison import plot_runs

    if not options.runs:
        raise InputError("plot: expected one run or more, got none")
    plot_runs([Path(run) for run in options.runs], Path(options.out), options.x)
    print(f"written: {options.out}")
    return 0
