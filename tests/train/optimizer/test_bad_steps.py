import statistics
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.model import GPT
from tritium.train.data.loader import Batch
from tritium.train.optimizer.bad_steps import (
    REFRESH,
    WINDOW,
    LossScale,
    StepJudge,
    is_judge_state,
)
from tritium.train.recipes import recipe
from tritium.train.trainer import single_trainer

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


def is_bad(step_judge: StepJudge, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Judge a step as the optimizer does."""
    found = step_judge.is_bad(loss, norm)
    step_judge.count_step()
    return found


def judge(losses, threshold=6.0) -> list[bool]:
    """Judge steps with these losses and a norm of 1."""
    norm = torch.ones(())
    step_judge = StepJudge(threshold, CPU)
    return [is_bad(step_judge, torch.tensor(loss), norm).item() for loss in losses]


def noisy(count: int) -> list[float]:
    return [3.0 + 0.1 * (-1) ** step for step in range(count)]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_always_bad(threshold, value):
    bad = torch.tensor(value)
    good = torch.ones(())
    step_judge = StepJudge(threshold, CPU)
    assert is_bad(step_judge, bad, good)
    assert is_bad(step_judge, good, bad)
    assert not is_bad(step_judge, good, good)


def test_outliers_are_bad_once_half_of_the_window_is_filled():
    losses = noisy(WINDOW // 2 + REFRESH)
    assert not any(judge([1e9, *losses]))
    assert judge([*losses, 9.0, 3.1])[-2:] == [True, False]
    assert not judge([*losses, 9.0], threshold=0.0)[-1]
    assert not judge([*losses, 0.1])[-1], "a small loss is good"


def test_a_few_bad_steps_do_not_move_the_limits():
    losses = noisy(WINDOW)
    spikes = [torch.nan, 50.0] * 10
    assert judge([*losses, *spikes, 3.1])[-21:] == [True] * 20 + [False]


def test_the_limits_stay_in_the_same_memory():
    """A CUDA graph reads them there."""
    step_judge = StepJudge(6.0, CPU)
    limits = step_judge._limits
    for loss in noisy(WINDOW):
        is_bad(step_judge, torch.tensor(loss), torch.ones(()))
    step_judge.load_state_dict(step_judge.state_dict())
    assert step_judge._limits is limits


def test_equal_losses_are_good():
    assert not any(judge([3.0] * WINDOW + [3.01]))


def test_a_judge_goes_on_from_its_state():
    step_judge = StepJudge(6.0, CPU)
    losses = noisy(WINDOW + 3)
    for loss in losses:
        is_bad(step_judge, torch.tensor(loss), torch.ones(()))
    other = StepJudge(6.0, CPU)
    other.load_state_dict(step_judge.state_dict())
    for loss in [*noisy(20), 3.9, torch.nan, 4.0]:
        arguments = torch.tensor(loss), torch.ones(())
        assert is_bad(step_judge, *arguments) == is_bad(other, *arguments)
    assert str(step_judge.state_dict()) == str(other.state_dict())  # NaN is not equal to NaN


@pytest.mark.parametrize(
    "changes",
    [
        {"count": -1},
        {"count": 2**63},
        {"count": 1.0},
        {"window": [[0.0] * WINDOW]},
        {"window": [[0.0], [0.0]]},
        {"limits": [1.0]},
        {"limits": [1, 2]},
        {"limits": None},
        {"other": 1},
    ],
    ids=str,
)
def test_records_with_other_fields_or_values_are_not_a_state_of_a_judge(changes):
    state = StepJudge(6.0, CPU).state_dict()
    assert is_judge_state(state)
    assert not is_judge_state(state | changes)


def test_the_loss_scale_changes_as_in_pytorch_except_after_a_bad_step():
    ours = LossScale(CPU, enabled=True)
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(torch.ones(()))
    ours.GROWTH_INTERVAL = 3
    theirs.set_growth_interval(3)
    for found in (1, 0, 0, 0, 0, 1, 0):
        ours.update(torch.tensor(bool(found)), torch.tensor(bool(found)))
        state = theirs._per_optimizer_states[0]
        state["found_inf_per_device"] = {CPU: torch.tensor(float(found))}
        theirs.update()
        assert ours.state_dict()["scale"] == theirs.get_scale()
    before = ours.state_dict()
    ours.update(torch.tensor(True), torch.tensor(False))
    assert ours.state_dict() == before
    assert theirs.state_dict().keys() >= before.keys()
    ours.load_state_dict(theirs.state_dict())
    one = torch.ones(())
    assert ours.overflowed(one, one * torch.inf)
    assert not ours.overflowed(one * torch.nan, one * torch.nan)
    ours.load_state_dict({"scale": 1.0, "_growth_tracker": 0})
    assert not ours.overflowed(one, one * torch.inf), "a scale of 1 cannot be the reason"


def test_judging_a_step_launches_few_kernels():
    """Operators that only change shapes launch none. Counted over complete windows."""
    launched = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if torch.Tag.inplace_view not in func.tags and "view" not in str(func.overloadpacket):
                launched.append(func)
            return func(*args, **kwargs or {})

    step_judge = StepJudge(6.0, CPU)
    one = torch.ones(())
    with Count():
        for _ in range(WINDOW):
            is_bad(step_judge, one, one)
    assert len(launched) <= 10 * WINDOW


@pytest.mark.slow
def test_judging_steps_takes_less_than_a_fivehundredth_of_a_step():
    """For the recipe `laptop`, in CPU time of this thread. Steps and judgements alternate."""
    config = recipe("laptop").with_options(batch_size=4, micro_batch_size=4)
    T = config.model.context_tokens
    trainer = single_trainer(GPT(config.gpt(4096)), config)
    rows = Batch(torch.randint(4096, (4, T + 1)), np.full(4, T))
    step_judge = StepJudge(config.skip_threshold, CPU)
    seconds = {"step": [], "judge": []}
    for _ in range(6):
        began = time.thread_time()
        loss = trainer.backward(rows)
        norm = trainer.update(1e-3)
        seconds["step"].append(time.thread_time() - began)
        began = time.thread_time()
        is_bad(step_judge, loss, norm).float()
        seconds["judge"].append(time.thread_time() - began)
    share = statistics.median(seconds["judge"]) / statistics.median(seconds["step"])
    print(f"judging takes {share:.4%} of a step")
    assert share < 0.002
