import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

from tritium.train.distributed.world import World
from tritium.train.evaluate import Evaluation
from tritium.train.machine.gpus import ceiling
from tritium.train.optimizer.bad_steps import OVERFLOWED
from tritium.train.run import goodput
from tritium.train.run.metrics import (
    STEPS_AHEAD,
    STEPS_PER_READ,
    Metrics,
    describe_goodput,
    read_metrics,
)

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


def metrics(run, start=0, **options):
    sizes = {
        "steps": 30,
        "tokens_per_step": 100,
        "flops_per_token": 10,
        "device": CPU,
    }
    return Metrics(run, start=start, **sizes | options)


def record(m, steps):
    for step in steps:
        record_step(m, step, 5.0 - step / 10, 0.5, 0)


def record_step(m, step, loss, norm, skipped):
    m.step(step, torch.tensor(loss), 1e-3, torch.tensor(norm), torch.tensor(float(skipped)))


def test_each_step_has_a_line(tmp_path):
    with metrics(tmp_path) as m:
        record(m, range(STEPS_PER_READ + 2))
        with m.paused("evaluation"):
            m.evaluation(STEPS_PER_READ + 2, Evaluation(loss=3.0, bits_per_byte=1.5, tokens=9))
    rows, evaluations = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(STEPS_PER_READ + 2))
    assert rows[3] | {"tokens_per_second": 0, "memory": 0} == {
        "step": 3, "tokens": 400, "loss": pytest.approx(4.7), "lr": 1e-3, "grad_norm": 0.5,
        "skipped": False, "tokens_per_second": 0, "mfu": None, "memory": 0, "data_wait": 0,
        "checkpoint_stall": 0.0,
    }  # fmt: skip
    assert rows[3]["tokens_per_second"] > 0
    assert rows[3]["memory"] > 2**25  # in bytes: PyTorch alone takes more
    assert evaluations == [
        {
            "step": 12,
            "val_loss": 3.0,
            "val_perplexity": pytest.approx(20.0855369),
            "val_bits_per_byte": 1.5,
        }
    ]


def test_each_step_moves_the_bar_and_the_first_ends_the_compilation(tmp_path):
    with metrics(tmp_path, compiles=True) as m:
        (task,) = m._bars.tasks
        assert (task.completed, task.fields["note"]) == (0, "compiling")
        record(m, [0])
        assert (task.completed, task.fields["note"]) == (1, "")
        with m.progress("evaluation", 4) as advance:
            advance(3)
            assert [(each.description, each.completed) for each in m._bars.tasks] == [
                ("train", 1),
                ("evaluation", 3),
            ]
        assert m._bars.tasks == [task]
        m.flush()
        assert task.fields["note"].startswith("loss 5.000")


def test_lines_with_the_loss_are_printed_at_the_interval(tmp_path, capsys):
    with metrics(tmp_path, log_interval=4) as m:
        record(m, range(10))
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert [line.split(",")[0] for line in lines] == [
        "step 4: loss 4.7000",
        "step 8: loss 4.3000",
    ]


def test_data_wait_is_the_fraction_of_step_time_spent_waiting(tmp_path, monkeypatch):
    """With a fake clock: 1 s of 4 s is waiting. Paused time does not count."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with metrics(tmp_path) as m:
        for step in range(2):
            with m.waiting():
                now[0] += 1
            now[0] += 3
            record(m, [step])
            with m.paused("evaluation"):
                now[0] += 100
        with m.waiting():
            now[0] += 2
        record(m, [2])
        m.flush()
    assert [row["data_wait"] for row in read_metrics(tmp_path)[0]] == [0.25, 0.25, 1.0]


def test_mfu_is_of_the_peak_of_all_gpus_and_null_if_it_is_unknown(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        torch.cuda,
        "Event",
        lambda: SimpleNamespace(record=lambda _: None, synchronize=lambda: None),
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(World, "on_rank0", lambda self, work: work())
    for name, ranks, mfu in (
        ("NVIDIA H200", 1, 0.5),
        ("NVIDIA H200", 2, 0.25),
        ("NVIDIA Unheard-of", 1, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        run = tmp_path / f"{name} {ranks}"
        run.mkdir()
        flops = ceiling("NVIDIA H200").bf16_flops
        with metrics(
            run,
            device=torch.device("cuda"),
            world=World(size=ranks),
            tokens_per_step=10,
            flops_per_token=flops / 10,
        ) as m:
            now[0] += 2
            record(m, [0])
            m.flush()
        assert read_metrics(run)[0][0]["mfu"] == mfu


def test_resumed_run_has_each_step_once(tmp_path):
    with metrics(tmp_path) as m:
        record(m, range(20))
        with m.paused("evaluation"):
            for step in (10, 20):
                m.evaluation(step, Evaluation(loss=3.0, bits_per_byte=1.0, tokens=9))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('[]\n"step"\n{"step": 20, "lo')  # the last line: killed while writing
    with metrics(tmp_path, start=10) as m:
        assert m.evaluated == {10}
        record(m, range(10, 15))
        m.flush()
    rows, evaluations = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(15))
    assert [row["step"] for row in evaluations] == [10]


def test_bad_steps_in_a_row_are_counted_and_an_overflow_neither_counts_nor_ends_them(tmp_path):
    with metrics(tmp_path) as m:
        record_step(m, 0, torch.nan, 1.0, 1)
        record(m, [1])
        record_step(m, 2, 5.0, torch.inf, 1)
        record_step(m, 3, 5.0, torch.inf, OVERFLOWED)
        record_step(m, 4, 90.0, 1.0, 1)
        m.flush()
        assert [row["step"] for row in m.bad_steps] == [2, 4]
        assert m.skipped == 4
    rows, _ = read_metrics(tmp_path)
    assert [row["skipped"] for row in rows] == [True, False, True, True, True]
    assert (rows[0]["loss"], rows[2]["grad_norm"]) == (None, None)
    with metrics(tmp_path, start=5) as m:
        assert [row["step"] for row in m.bad_steps] == [2, 4]
        assert m.skipped == 4
        m.went_back(5, 0)
        record(m, [5])
    with metrics(tmp_path, start=5) as m:
        assert not m.bad_steps
        assert m.restored == {"step": 5, "restored": 0}


def test_a_resume_tells_lost_lines(tmp_path, capsys):
    with metrics(tmp_path) as m:
        record(m, range(10))
        m.flush()
    with metrics(tmp_path, start=14):
        pass
    assert "4 of the 14 steps before the checkpoint have no line" in capsys.readouterr().err


def test_on_cuda_reading_does_not_wait_for_the_newest_step(tmp_path, monkeypatch):
    """With fake CUDA events that record the order of waits."""
    waited = []

    class Event:
        def record(self, stream):
            self.number = len(recorded)
            recorded.append(self)

        def synchronize(self):
            waited.append(self.number)

    recorded = []
    calls = {
        "Event": Event,
        "current_stream": lambda device: None,
        "get_device_name": lambda device: "a GPU",
    }
    for name, call in (calls | {"max_memory_allocated": lambda device: 7}).items():
        monkeypatch.setattr(torch.cuda, name, call)
    with metrics(tmp_path, device=torch.device("cuda")) as m:
        for step in range(2 * STEPS_PER_READ + 1):
            record(m, [step])
            assert step not in waited
            # The host is never more than STEPS_AHEAD steps ahead of the device.
            assert step < STEPS_AHEAD or step - STEPS_AHEAD in waited
        assert len(read_metrics(tmp_path)[0]) == 2 * STEPS_PER_READ
        m.flush()
    rows, _ = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(2 * STEPS_PER_READ + 1))
    assert rows[0]["memory"] == 7


@pytest.mark.parametrize("shares", [None, {}])
def test_goodput_without_its_line_is_not_known(shares, tmp_path):
    line = {"step": 1, "goodput": shares, "time": 1, "wall_seconds": 1, "skipped_steps": 0}
    (tmp_path / "metrics.jsonl").write_text("" if shares is None else json.dumps(line) + "\n")
    assert describe_goodput(tmp_path) == "not known"


def test_steps_that_are_taken_again_count_as_restarts(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "process_age", lambda: 0.0)
    with metrics(tmp_path) as m:
        record(m, range(4))
        m.flush()
        m.write_goodput(4)
    line = {"tokens": 0, "loss": 4.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 10.0}
    file = tmp_path / "metrics.jsonl"
    lost = 0
    for last in (10, 6):  # the second process dies before its first checkpoint
        with open(file, "a") as lines:
            for step in range(4, last):  # 100 tokens per step
                lines.write(json.dumps(line | {"step": step, "tokens": 100 * (step + 1)}) + "\n")
        os.utime(file, (2**31, 2**31))  # as after a copy of the folder
        lost += last - 4
        with metrics(tmp_path, start=4) as m:
            assert m.goodput.seconds["restarts"] == pytest.approx(lost * 10, abs=5)
