import time

import pytest

from tritium.train.run import goodput
from tritium.train.run.goodput import Goodput, describe, process_age, seconds_before

pytestmark = pytest.mark.plain


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(goodput, "process_age", lambda: 3.0)
    return now


def test_shares_add_up_to_the_wall_time_and_a_resume_goes_on_with_them(clock):
    first = Goodput()
    clock[0] += 1
    first.begin("steps")
    clock[0] += 10
    with first.during("evaluation"):
        clock[0] += 2
        with first.during("checkpoints"):
            clock[0] += 4
    line = first.record()
    assert line["wall_seconds"] == 20
    assert line["goodput"]["setup"] == pytest.approx(4 / 20)
    assert line["goodput"]["steps"] == pytest.approx(10 / 20)
    assert sum(line["goodput"].values()) == pytest.approx(1)

    # The process made steps for 5 s more and died. The next one started after a day.
    clock[0] += 86_400
    second = Goodput(seconds_before(line, lost=5))
    clock[0] += 2
    second.begin("steps")
    after = second.record()
    assert after["wall_seconds"] == pytest.approx(20 + 5 + 3 + 2)
    assert after["goodput"]["restarts"] == pytest.approx(10 / 30)
    assert describe(after) == (
        "33.3% of 30 s in steps; evaluation 6.7%, checkpoints 13.3%, setup 13.3%, restarts 33.3%"
    )
    assert seconds_before(after, lost=4)["restarts"] == pytest.approx(10 + 4)


def test_the_age_of_this_process_is_known():
    assert 0.01 < process_age() < 1e6
