import contextlib
import json

import pytest

from tritium.bench.record import read_record
from tritium.bench.report import RESULTS
from tritium.bench.training import traffic
from tritium.bench.training.traffic import (
    PRESET_NAMES,
    SEQUENCES,
    eager_passes,
    figures,
    least,
    main,
    tritium_passes,
)
from tritium.model import PRESETS, GPTConfig

pytestmark = pytest.mark.plain

DIRECTIONS = ("forward", "backward")
SMALL = GPTConfig(n_head=2, d_model=32, context_tokens=16)


@pytest.fixture(scope="module")
def found():
    return figures()


@pytest.mark.parametrize("index", range(len(PRESET_NAMES)), ids=PRESET_NAMES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_block_moves_less_than_eager_and_at_least_the_least(found, index, direction):
    row = found["blocks"][index]
    ours, eager = (row[name][direction]["token_bytes"] for name in ("tritium", "eager"))
    assert row["least"][direction] <= ours < eager


def test_the_least_of_gpt2():
    """28 and 52 tensors of the width, since F = 4 D, and lse of 12 heads."""
    assert least(PRESETS["gpt2"], 2) == {
        "forward": 28 * 768 * 2 + 12 * 4,
        "backward": 52 * 768 * 2 + 12 * 4,
    }


def test_the_committed_record_has_the_present_figures(found):
    """After a change: `tritium bench traffic --out bench/results/traffic.json`, then report."""
    record = read_record(RESULTS / "traffic.json", "traffic")
    assert {key: record[key] for key in found} == json.loads(json.dumps(found))


@pytest.mark.parametrize("passes", [tritium_passes, eager_passes])
def test_bytes_grow_linearly_with_the_sequences(found, passes):
    row = found["blocks"][0][passes.__name__.removesuffix("_passes")]
    sequences = 3 * SEQUENCES[0]
    third = passes(PRESETS["gpt2"], sequences)
    for direction in DIRECTIONS:
        expected = row[direction]["token_bytes"] * sequences * 1024 + row[direction]["step_bytes"]
        assert third[direction].total() == expected


def test_fake_tensors_are_counted_like_real_ones(monkeypatch):
    fake = eager_passes(SMALL, 2)
    monkeypatch.setattr(traffic, "FakeTensorMode", contextlib.nullcontext)
    assert eager_passes(SMALL, 2) == fake


def test_each_step_reads_the_weights_twice_and_writes_their_gradients(found):
    """12 D^2 in matrices, and less than a tenth of that in vectors. Ours adds partial sums."""
    for row in found["blocks"]:
        matrices = 3 * 12 * row["d_model"] ** 2 * 2
        eager, ours = (
            sum(row[name][direction]["step_bytes"] for direction in DIRECTIONS)
            for name in ("eager", "tritium")
        )
        assert matrices < eager < 1.1 * matrices
        assert eager < ours


def test_the_command_prints_and_writes(found, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(traffic, "figures", lambda: found)
    assert main(["--out", str(tmp_path / "traffic.json")]) == 0
    assert "| gpt2-xl | " in capsys.readouterr().out
    assert read_record(tmp_path / "traffic.json", "traffic")["blocks"][0]["preset"] == "gpt2"
