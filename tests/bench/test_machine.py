from dataclasses import replace

import pytest

from tritium.bench import machine
from tritium.bench.machine import main
from tritium.bench.record import read_record
from tritium.errors import InputError
from tritium.train.recipes import RECIPES

pytestmark = pytest.mark.plain


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tiny = RECIPES["shakespeare-char"].with_options(
        n_layer=1, n_head=2, d_model=16, context_tokens=16, batch_size=4
    )
    monkeypatch.setitem(RECIPES, "tiny", replace(tiny, tokenizer="bytes"))
    limits = {"bytes_per_second": 2e10, "flops_per_second": 1e11}
    monkeypatch.setattr(machine, "ceilings", lambda device, dtype: limits)


def test_two_equal_steps_have_equal_hashes(tmp_path, capsys):
    out = tmp_path / "machine.json"
    assert main(["tiny", "--device", "cpu", "--out", str(out)]) == 0
    record = read_record(out, "machine")
    first, second = record["step_hashes"]["eager"]
    assert first == second
    assert record["ceilings"]["bytes_per_second"] == 2e10
    shown = capsys.readouterr().out
    assert "copy 0.020 TB/s, matmul 0.10 TFLOP/s" in shown
    assert f"weights after two equal steps, eager: equal ({first}, {second})" in shown


def test_other_weights_have_another_hash_and_the_status_is_1(monkeypatch, capsys):
    original = machine.random_batch
    batches = iter([0, 1])
    monkeypatch.setattr(
        machine, "random_batch", lambda config, shape, _: original(config, shape, next(batches))
    )
    assert main(["tiny", "--device", "cpu"]) == 1
    assert "eager: NOT EQUAL" in capsys.readouterr().out


def test_a_micro_batch_of_0_raises():
    with pytest.raises(InputError, match="micro_batch_size: expected 1 or more, got 0"):
        main(["tiny", "--micro-batch-size", "0"])
