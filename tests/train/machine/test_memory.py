import pytest
import torch

from tritium.model import PRESETS
from tritium.train.machine import memory
from tritium.train.machine.memory import device_bytes, fits, host_bytes, largest_micro_batch

pytestmark = pytest.mark.plain

OPTIONS = {"itemsize": 2, "recompute": "none", "optimizer": "adamw"}


def test_the_largest_micro_batch_fits_and_no_larger_divisor_does():
    model = PRESETS["gpt2"]
    for gigabytes in (8, 16, 24):
        size = largest_micro_batch(model, 60, memory_bytes=gigabytes * 10**9, **OPTIONS)
        assert 60 % size == 0
        larger = min(other for other in range(size + 1, 61) if 60 % other == 0)
        for candidate, expected in ((size, True), (larger, False)):
            parts = memory.memory(model, candidate, 1024, accumulates=True, **OPTIONS)
            assert fits(parts, gigabytes * 10**9) is expected


def test_a_micro_batch_has_at_most_65536_tokens():
    assert largest_micro_batch(PRESETS["gpt2"], 120, memory_bytes=10**15, **OPTIONS) == 60


def test_processes_divide_the_memory_of_the_host(monkeypatch):
    cpu = torch.device("cpu")
    assert device_bytes(cpu, 2) == host_bytes() // 2
    monkeypatch.setattr(memory, "host_bytes", lambda: None)
    assert device_bytes(cpu, 1) == 8 * 2**30
