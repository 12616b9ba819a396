"""Learning rates as functions of the step: rows of the table SCHEDULES.

    warm-up    lr (step + 1) / (warmup_steps + 1)
    cosine     min_lr + (lr - min_lr) (1 + cos(pi u)) / 2; u = 0 after the warm-up, 1 at the end
    constant   lr
    wsd        lr, then linear to min_lr over the last fifth of the steps

Source     Loshchilov & Hutter 2017, arXiv:1608.03983; Hu et al. 2024, arXiv:2404.06395 (warm-up,
           stable, decay)
"""

import math
from typing import TYPE_CHECKING

from ..errors import InputError, plural

if TYPE_CHECKING:
    from .config import TrainConfig

WSD_DECAY_FRACTION = 0.2


def learning_rate(config: "TrainConfig", step: int) -> float:
    """Return the learning rate of `step`, 0 to steps - 1."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    return SCHEDULES[config.schedule](config, step)


def check_learning_rates(config: "TrainConfig") -> None:
    """Raise InputError if the learning rate would rise to min_lr."""
    if config.schedule != "constant" and config.min_lr > config.lr:
        raise InputError(
            f"lr: expected min_lr, {config.min_lr:g}, or more, got {config.lr:g}; also give a "
            "smaller `min_lr`"
        )


def describe_long_warmup(config: "TrainConfig") -> str | None:
    """Return one line if the warm-up is not over at the end of the run, else None."""
    if config.warmup_steps < config.steps:
        return None
    return (
        f"the warm-up of {plural(config.warmup_steps, 'step')} is as long as the run or longer: "
        f"the learning rate ends at {learning_rate(config, config.steps - 1):.3g}, below lr "
        f"{config.lr:.3g}; shorten the warm-up"
    )


def _cosine(config: "TrainConfig", step: int) -> float:
    angle = math.pi * _progress(step, config.warmup_steps, config.steps - 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(angle)) / 2


def _constant(config: "TrainConfig", step: int) -> float:
    return config.lr


def _wsd(config: "TrainConfig", step: int) -> float:
    start = max(config.warmup_steps, round(config.steps * (1 - WSD_DECAY_FRACTION)))
    return config.lr + (config.min_lr - config.lr) * _progress(step, start, config.steps - 1)


def _progress(step: int, start: int, last: int) -> float:
    """Return 0 up to `start`, then rise linearly to 1 at `last`."""
    return min(1.0, max(0.0, (step - start) / max(1, last - start)))


# Learning rate after the warm-up, by the value of the option `schedule`.
SCHEDULES = {"cosine": _cosine, "constant": _constant, "wsd": _wsd}
