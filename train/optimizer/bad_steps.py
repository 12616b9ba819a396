"""Skip bad steps: judge a step on the device, before the optimizer uses its gradients.

    judged     v = (loss, gradient norm) of a step, over all ranks
    bad        v > limit, or v is not finite
    limit      median + threshold s     s = max(1.4826 median |v - median|, 0.01 median)
               over the last WINDOW steps. (v - median) / s is the robust z-score. Until half of the
               window is filled, only values that are not finite are bad
    skipped    the update of a bad step changes neither weights nor optimizer state

The step counter, the learning rate and the data do not depend on the judgement: step s uses batch s
and learning rate s, whether or not earlier steps were skipped. So a run that skipped step s has
bitwise the weights and the optimizer state of a run that left step s out: no forward, no backward
and no update at step s, and all other steps as they were. Only the limits of later steps differ:
the values of a bad step stay in the window, where the median hardly notices them.

float16    A step with a finite loss and gradients that are not finite overflowed: the loss scale
           was too large. The step is skipped and the scale halved, and the step is not bad. At a
           scale of 1 or less such a step is bad. A bad step leaves the loss scale as it was
Ranks      Loss and norm are equal on all ranks, so all ranks decide alike without communication
Threshold  four runs of a GPT of 4 layers of 256 with AdamW, 500 steps each, had largest z-scores of
           6 to 10. The default of 20 skips none of their steps
Cost       a few small kernels per step. Nothing waits for the device
Source     Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers
"""

import torch
from torch import Tensor

# As in the SkipStepOptimizer of OLMo-core, which uses mean and standard deviation.
WINDOW = 128
# Steps between computations of the limits.
REFRESH = 8
# Standard deviations per median absolute deviation, for a normal distribution.
_DEVIATIONS = 1.4826
# Smallest s, as a fraction of the median. Losses that hardly vary would make every step an outlier.
_LEAST_DEVIATION = 0.01
# Value of Optimizer.skipped after a step that overflowed in float16. A bad step has 1.
OVERFLOWED = 2


class StepJudge:
    """Decides whether a step is bad. All values stay on the device.

    Args:
        threshold: largest robust z-score of a good step. 0: only values that are not finite are
            bad.
        device: the device of losses and gradient norms.
    """

    def __init__(self, threshold: float, device: torch.device):
        self._threshold = threshold
        self._count = 0
        # Column of the window for the next step.
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        # Loss and gradient norm of the last steps. Steps that are missing count as infinite.
        self._window = torch.full((2, WINDOW), torch.inf, device=device)
        self._limits = torch.full((2,), torch.finfo(torch.float32).max, device=device)

    def is_bad(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Judge the next step; then call `count_step`. A CUDA graph can record it.

        Returns: () bool on the device.
        """
        values = torch.stack((loss, grad_norm))
        # A comparison with NaN is false.
        is_good = torch.le(values, self._limits).all()
        if self._threshold:
            # A bad step is part of the window: the median ignores it. If the loss has risen for
            # good, the limits follow.
            self._window.index_copy_(1, self._place, values.view(2, 1))
        return is_good.logical_not()

    def count_step(self) -> None:
        """Count a judged step, and compute the limits again if it is time."""
        if not self._threshold:
            return
        self._count += 1
        self._place.fill_(self._count % WINDOW)
        if self._count % REFRESH == 0:
            self._refresh_limits()

    def _refresh_limits(self) -> None:
        median = _median(self._window)
        deviation = _DEVIATIONS * _median((self._window - median).abs())
        deviation = torch.maximum(deviation, _LEAST_DEVIATION * median.abs())
        largest = torch.finfo(torch.float32).max
        limits = torch.nan_to_num(median + self._threshold * deviation, nan=largest)
        self._limits.copy_(limits[:, 0])

    def state_dict(self) -> dict:
        """Return the state as numbers. It waits for the device."""
        return {
            "count": self._count,
            "window": self._window.tolist(),
            "limits": self._limits.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self._count = state["count"]
        self._place.fill_(self._count % WINDOW)
        self._window.copy_(torch.tensor(state["window"]))
        self._limits.copy_(torch.tensor(state["limits"]))


def is_judge_state(value: object) -> bool:
    """Return whether `value`, read from JSON, has the types of StepJudge.state_dict()."""

    def is_numbers(found: object, length: int) -> bool:
        is_list = isinstance(found, list) and len(found) == length
        return is_list and all(type(each) is float for each in found)

    if not isinstance(value, dict) or value.keys() != {"count", "window", "limits"}:
        return False
    count, window = value["count"], value["window"]
    is_count = type(count) is int and 0 <= count < 2**63
    is_window = isinstance(window, list) and len(window) == 2
    return (
        is_count
        and is_numbers(value["limits"], 2)
        and is_window
        and all(is_numbers(row, WINDOW) for row in window)
    )


def _median(rows: Tensor) -> Tensor:
    """Return the lower median of each row, (rows, 1). NaN counts as larger than infinity."""
    middle = (rows.shape[1] - 1) // 2
    return rows.sort(dim=1).values[:, middle : middle + 1]


class LossScale:
    """Scales the losses of float16, so that small gradients do not round to zero.

    The scale is halved after a step that overflowed, and doubled after GROWTH_INTERVAL steps in a
    row without overflow, as torch.amp.GradScaler does. In other precisions it does nothing.
    """

    START = 2.0**16
    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, *, enabled: bool):
        self._enabled = enabled
        self._scale = torch.full((), self.START, device=device)
        self._steps_without_overflow = torch.zeros((), dtype=torch.int32, device=device)

    def is_enabled(self) -> bool:
        return self._enabled

    def scale(self, loss: Tensor) -> Tensor:
        """Return the scaled loss."""
        return loss * self._scale if self._enabled else loss

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide gradients by the scale, in place. The scale is a power of two: this is exact."""
        if self._enabled:
            torch._foreach_mul_(gradients, self._scale.reciprocal())

    def overflowed(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return whether the scale was too large for this step, () bool on the device."""
        return loss.isfinite() & grad_norm.isfinite().logical_not() & (self._scale > 1)

    def update(self, is_skipped: Tensor, overflowed: Tensor) -> None:
        """Change the scale after a step. A step that was skipped for another reason keeps it."""
        scale = self._scale.clone()
        steps = self._steps_without_overflow.clone()
        torch._amp_update_scale_(scale, steps, overflowed.float(), 2.0, 0.5, self.GROWTH_INTERVAL)
        is_kept = is_skipped & overflowed.logical_not()
        torch.where(is_kept, self._scale, scale, out=self._scale)
        before = self._steps_without_overflow
        torch.where(is_kept, before, steps, out=before)

    def state_dict(self) -> dict:
        """Return the state as GradScaler does; {} if disabled. It waits for the device."""
        if not self._enabled:
            return {}
        return {
            "scale": self._scale.item(),
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": self.GROWTH_INTERVAL,
            "_growth_tracker": self._steps_without_overflow.item(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` or torch.amp.GradScaler.state_dict returned."""
        if self._enabled and state:
            self._scale.fill_(state["scale"])
            self._steps_without_overflow.fill_(state["_growth_tracker"])
