"""How many threads a process uses, and the warning if they do not get their cores."""

import os
import time

import pytest
import torch

from tritium.train.machine import threads
from tritium.train.machine.threads import CoreTime, cpu_limit, limit_threads

pytestmark = pytest.mark.plain


def test_the_limit_of_a_container_is_read_in_both_formats(tmp_path):
    assert cpu_limit(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    quota, period = (tmp_path / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
    period.write_text("100000\n")
    quota.write_text("-1\n")
    assert cpu_limit(tmp_path) is None
    quota.write_text("150000\n")
    assert cpu_limit(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert cpu_limit(tmp_path) == 4.0


def test_a_limit_reduces_the_threads_unless_the_user_chose(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        (tmp_path / "cpu.max").write_text("150000 100000\n")
        monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "4")
        limit_threads(tmp_path)
        assert torch.get_num_threads() == 4
        monkeypatch.delitem(os.environ, "OMP_NUM_THREADS")
        limit_threads(tmp_path)
        assert torch.get_num_threads() == 2
        (tmp_path / "cpu.max").write_text("1600000 100000\n")
        limit_threads(tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("core_seconds", "is_bad"), [(4.0, True), (11.0, False)])
def test_a_warning_comes_once_if_threads_get_half_of_their_cores(monkeypatch, core_seconds, is_bad):
    clock = {"perf_counter": 0.0, "process_time": 0.0}
    for name in clock:
        monkeypatch.setattr(threads.time, name, lambda name=name: clock[name])
    cores = CoreTime(2)
    clock["perf_counter"] += 100  # an evaluation, which does not count
    cores.start()
    clock["perf_counter"] += 6
    clock["process_time"] += core_seconds / 2
    assert cores.end() is None
    clock["perf_counter"] += 4
    clock["process_time"] += core_seconds / 2
    warning = cores.end()
    assert (warning is not None) == is_bad
    if is_bad:
        assert warning.startswith("2 threads got 20% of the time of 2 cores")
    clock["perf_counter"] += 50
    assert cores.end() is None


def test_one_thread_gives_no_warning(monkeypatch):
    now = time.perf_counter()
    cores = CoreTime(1)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now + 100)
    assert cores.end() is None
