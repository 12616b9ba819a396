import pytest

from tritium.errors import InputError
from tritium.train.config import TrainConfig
from tritium.train.schedule import check_learning_rates, describe_long_warmup, learning_rate

pytestmark = pytest.mark.plain


def rates(**options) -> list[float]:
    config = TrainConfig.from_options(
        **{"steps": 101, "warmup_steps": 10, "lr": 1.0, "min_lr": 0.1} | options
    )
    return [learning_rate(config, step) for step in range(config.steps)]


def test_the_warm_up_is_linear_and_never_zero():
    assert rates()[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])


def test_cosine_goes_from_lr_to_min_lr():
    values = rates()
    assert values[10] == 1.0
    assert values[100] == pytest.approx(0.1)
    assert values[55] == pytest.approx(0.55)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_constant_stays_at_lr():
    assert set(rates(schedule="constant")[10:]) == {1.0}


def test_wsd_is_constant_then_linear():
    values = rates(schedule="wsd")
    assert set(values[10:82]) == {1.0}
    assert values[91] == pytest.approx(1 - 0.9 * 10 / 19)
    assert values[100] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_runs_shorter_than_the_warm_up_end_in_it(schedule):
    assert rates(steps=3, schedule=schedule) == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert rates(steps=1, warmup_steps=0, schedule=schedule) == [1.0]


def test_a_warmup_as_long_as_the_run_is_described():
    config = TrainConfig.from_options(steps=20, warmup_steps=19, lr=0.1)
    assert describe_long_warmup(config) is None
    line = describe_long_warmup(config.with_options(warmup_steps=39))
    assert "warm-up of 39 steps" in line
    assert "ends at 0.05, below lr 0.1" in line


def test_a_last_rate_above_the_peak_raises():
    rates = {"lr": 1e-5, "min_lr": 1e-4}
    with pytest.raises(InputError, match=r"lr: expected min_lr, 0\.0001, or more, got 1e-05"):
        check_learning_rates(TrainConfig.from_options(**rates))
    check_learning_rates(TrainConfig.from_options(**rates, schedule="constant"))
    check_learning_rates(TrainConfig.from_options(lr=1e-4, min_lr=1e-4))
