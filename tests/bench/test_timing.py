import time

import pytest
import torch

from tritium.bench.timing import ceilings, input_sets, summary, time_in_turn

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


def test_summary_has_median_and_percentiles():
    found = summary([float(value) for value in range(11)])
    assert found == {"median": 5.0, "p10": 1.0, "p90": 9.0}
    assert summary([2.0])["p90"] == 2.0


def test_calls_take_turns_and_the_slower_call_has_the_longer_time():
    order = []

    def call(name, seconds):
        def run(number):
            order.append(name)
            time.sleep(seconds)

        return run

    found = time_in_turn({"a": call("a", 0.001), "b": call("b", 0.01)}, CPU, rounds=4, warmup=1)
    assert order == ["a", "b"] * 5
    assert found["b"]["median"] > 0.01 > found["a"]["median"] > 0.001


def test_ceilings_are_positive_and_a_cpu_needs_one_input_set():
    found = ceilings(CPU, torch.float32)
    assert found["bytes_per_second"] > 1e8
    assert found["flops_per_second"] > 1e8
    assert input_sets(10, CPU) == 1
