"""Trackers: TensorBoard, Weights & Biases and functions of the user get lines of metrics.jsonl too.

Both packages are in the extra `log` and are imported only when used. metrics.jsonl has everything
that a tracker has, and nothing is read back from a tracker. A resumed run continues in the
same run of the tracker.
"""

import importlib.util
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...errors import InputError
from ..config import TrainConfig
from ..storage.files import write_whole


class Tracker(Protocol):
    """Receives lines, in the order of metrics.jsonl. Each line is a dictionary with a step."""

    def write(self, line: dict) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Write scalars to RUN/tensorboard. Scalars from step `start` on are dropped first."""

    def __init__(self, run: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def write(self, line: dict) -> None:
        for name, value in _values(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Log to a run of a Weights & Biases project. RUN/wandb-id holds the id of that run.

    Weights & Biases ignores steps that it already has.
    """

    def __init__(self, config: TrainConfig, run: Path):
        import wandb

        file = run / "wandb-id"
        if not file.exists():
            write_whole(file, [uuid.uuid4().hex.encode()])
        try:
            self._run = wandb.init(
                project=config.report.wandb,
                name=run.resolve().name,
                id=file.read_text(),
                resume="allow",
                dir=str(run),
                config=config.options(),
            )
        except wandb.Error as error:
            raise InputError(
                f"wandb: expected to open a run in {config.report.wandb}, got {error}; use "
                f"`wandb login` or WANDB_MODE=offline, and resume {run}"
            ) from None

    def write(self, line: dict) -> None:
        self._run.log(_values(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class Callbacks:
    """Functions of the user, which get lines of metrics.jsonl as dictionaries. None: no function.

    An exception in one stops the run after the current step. The run writes a checkpoint, calls no
    more functions, and raises the exception.
    """

    on_step: Callable[[dict], object] | None = None
    """Gets the line of each step, after its results were read: up to ten steps later."""
    on_evaluation: Callable[[dict], object] | None = None
    """Gets the line of each evaluation."""

    def __post_init__(self):
        for name, function in vars(self).items():
            if function is not None and not callable(function):
                raise InputError(f"{name}: expected a function, got {function!r}")


NO_CALLBACKS = Callbacks()


class CallbackTracker:
    """Call functions of the user.

    Args: stop: called with the exception of a function.
    """

    def __init__(self, callbacks: Callbacks, stop: Callable[[BaseException], None]):
        self._callbacks = callbacks
        self._stop = stop

    def write(self, line: dict) -> None:
        is_evaluation = "val_loss" in line
        callbacks = self._callbacks
        function = callbacks.on_evaluation if is_evaluation else callbacks.on_step
        if function is None:
            return
        try:
            function(line)
        except BaseException as error:  # KeyboardInterrupt too: the run writes a checkpoint first
            self._callbacks = NO_CALLBACKS
            self._stop(error)

    def close(self) -> None:
        pass


def check_trackers(config: TrainConfig) -> None:
    """Raise InputError if the package of a requested tracker is not installed."""
    requested = {"tensorboard": config.report.tensorboard, "wandb": config.report.wandb}
    for package, is_requested in requested.items():
        if not is_requested:
            continue
        found = importlib.util.find_spec(package)
        # wandb makes a folder `wandb` in the working directory. find_spec then finds a namespace
        # package, which has no origin.
        if found is None or found.origin is None:
            raise InputError(
                f"{package}: expected an installed {package}, found none; "
                "pip install 'tritium[log]'"
            )


def open_trackers(config: TrainConfig, run: Path, start: int) -> list[Tracker]:
    """Open the requested trackers, to continue with step `start`."""
    trackers: list[Tracker] = []
    if config.report.tensorboard:
        trackers.append(TensorBoard(run, start))
    if config.report.wandb:
        trackers.append(WeightsAndBiases(config, run))
    return trackers


def _values(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and value is not None}
