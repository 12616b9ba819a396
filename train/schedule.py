"""Learning rates as pure functions of the step.

    warm-up    lr (step + 1) / (warmup_steps + 1)
    cosine     min_lr + (lr - min_lr) (1 + cos(pi u)) / 2       u = how far step is from the end of warm-up to the last step
    constant   lr
    wsd        lr, then in a straight line to min_lr over the last fifth of the steps

Source     Loshchilov & Hutter 2017, arXiv:1608.03983; Hu et al. 2024, arXiv:2404.06395 (warm-up, stable, decay)
"""

import math

from .config import TrainConfig

WSD_DECAY_SHARE = 0.2


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of `step` (0 ... steps - 1)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    last = config.steps - 1
    if config.schedule == "wsd":
        start = max(config.warmup_steps, round(config.steps * (1 - WSD_DECAY_SHARE)))
        return config.lr + (config.min_lr - config.lr) * _progress(step, start, last)
    angle = math.pi * _progress(step, config.warmup_steps, last)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(angle)) / 2


def _progress(step: int, start: int, last: int) -> float:
    """0 up to `start`, 1 at `last`."""
    return min(1.0, max(0.0, (step - start) / max(1, last - start)))
