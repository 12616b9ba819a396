"""Where the lines of metrics.jsonl go too, if asked: TensorBoard, Weights & Biases. A resumed run goes on there as well.

Both are of extra `log`, imported only when used. What they hold can be had from metrics.jsonl; nothing reads it back.
"""

import importlib.util
import uuid
from pathlib import Path
from typing import Protocol

from ...errors import InputError
from ..config import TrainConfig
from ..files import write_whole


class Tracker(Protocol):
    """Takes lines, as dictionaries with a step, in the order of metrics.jsonl."""

    def write(self, row: dict) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars in RUN/tensorboard; those of steps that a resumed run does again are dropped."""

    def __init__(self, run: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def write(self, row: dict) -> None:
        for name, value in _values(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project there, found again by RUN/wandb-id; steps that it has already are not changed."""

    def __init__(self, config: TrainConfig, run: Path):
        import wandb

        file = run / "wandb-id"
        if not file.exists():
            write_whole(file, [uuid.uuid4().hex.encode()])
        named = {
            "project": config.report.wandb,
            "name": run.resolve().name,
            "id": file.read_text(),
            "resume": "allow",
        }
        try:
            self._run = wandb.init(**named, dir=str(run), config=config.options())
        except wandb.Error as error:
            what = f"expected to open a run in {config.report.wandb}, got {error}; use `wandb login`, or WANDB_MODE=offline"
            raise InputError(f"wandb: {what}, and --resume {run}") from None

    def write(self, row: dict) -> None:
        self._run.log(_values(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def check_trackers(config: TrainConfig) -> None:
    """Raise InputError if a package that the options ask for is not installed."""
    for option, asked in (
        ("tensorboard", config.report.tensorboard),
        ("wandb", config.report.wandb),
    ):
        if asked:
            found = importlib.util.find_spec(option)
            # A folder of that name, which wandb itself makes where it is called, is no package.
            if found is None or found.origin is None:
                raise InputError(
                    f"--{option}: expected an installed {option}, found none; pip install 'tritium[log]'"
                )


def open_trackers(config: TrainConfig, run: Path, start: int) -> list[Tracker]:
    """Those that the options ask for, to go on with step `start`."""
    trackers: list[Tracker] = [TensorBoard(run, start)] if config.report.tensorboard else []
    return [*trackers, WeightsAndBiases(config, run)] if config.report.wandb else trackers


def _values(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
