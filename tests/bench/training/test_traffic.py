import ast
import contextlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tritium.bench.record import read_record
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

FOLDER = Path(traffic.__file__).parents[1]
DIRECTIONS = ("forward", "backward")
SMALL = GPTConfig(n_head=2, d_model=32, context_tokens=16)


@pytest.fixture(scope="module")
def found():
    return figures()


@pytest.mark.parametrize("index", range(len(PRESET_NAMES)), ids=PRESET_NAMES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_block_moves_less_than_eager_and_no_less_than_it_must(found, index, direction):
    row = found["blocks"][index]
    ours, eager = (row[name][direction]["token_bytes"] for name in ("tritium", "eager"))
    assert row["least"][direction] <= ours < eager


def test_the_least_in_elements_of_the_width():
    config = PRESETS["gpt2"]
    assert least(config, 2) == {"forward": 28 * 768 * 2 + 12 * 4, "backward": 52 * 768 * 2 + 12 * 4}


def test_the_committed_record_says_what_is_counted(found):
    """After a change to what runs: `tritium bench traffic --out bench/results/traffic.json`, then `tritium bench report`."""
    record = read_record(FOLDER / "results" / "traffic.json", "traffic")
    assert {key: record[key] for key in found} == json.loads(json.dumps(found))


@pytest.mark.parametrize("passes", [tritium_passes, eager_passes])
def test_what_two_counts_say_holds_for_a_third(found, passes):
    row = found["blocks"][0][passes.__name__.removesuffix("_passes")]
    sequences = 3 * SEQUENCES[0]
    third = passes(PRESETS["gpt2"], sequences)
    for direction in DIRECTIONS:
        counted = row[direction]["token_bytes"] * sequences * 1024 + row[direction]["step_bytes"]
        assert third[direction].total() == counted


def test_what_is_told_of_tensors_that_hold_nothing_is_true_of_others(monkeypatch):
    """The same operators on the CPU, really run."""
    fake = eager_passes(SMALL, 2)
    monkeypatch.setattr(traffic, "FakeTensorMode", contextlib.nullcontext)
    assert eager_passes(SMALL, 2) == fake


def test_every_step_takes_the_weights_and_gives_their_gradients(found):
    """Twice read, once written: 12 D^2 in matrices, and less than a tenth of that in vectors; ours has partial sums too."""
    for row in found["blocks"]:
        matrices = 3 * 12 * row["d_model"] ** 2 * 2
        eager, ours = (
            sum(row[name][direction]["step_bytes"] for direction in DIRECTIONS)
            for name in ("eager", "tritium")
        )
        assert matrices < eager < 1.1 * matrices
        assert eager < ours


def test_no_kernel_of_a_block_reads_what_it_writes(found):
    """Else that would have to be counted twice."""
    counted = {
        name
        for row in found["blocks"]
        for direction in DIRECTIONS
        for name in row["tritium"][direction]["token_bytes_of"]
    }
    modules = [
        ast.parse(path.read_text(encoding="utf-8"))
        for path in (FOLDER.parent / "kernels").rglob("*.py")
    ]
    kernels = [
        node
        for module in modules
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name in counted
    ]
    written = []
    for kernel in kernels:
        # Neither its type nor whether it is there is read from memory.
        body = re.sub(
            r"\w+\.dtype|\w+ is (not )?None", "", "\n".join(map(ast.unparse, kernel.body))
        )
        stores = Counter(re.findall(r"store\w*\((\w+)", body)) + Counter(
            re.findall(r"(\w+)\.store\(", body)
        )
        for pointer in stores.keys() & {argument.arg for argument in kernel.args.args}:
            written.append(pointer)
            assert len(re.findall(rf"\b{pointer}\b", body)) == stores[pointer], (
                f"{kernel.name}: {pointer} is not only written"
            )
    assert {"y_ptr", "h_ptr", "o_ptr", "lse_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "dx_ptr"} <= set(
        written
    )


def test_the_perceptrons_memory(found):
    """In tensors of (N, F), F = 4 D. PyTorch's layers hold h, a, a gradient and y's at once, and make 4 of F, 3 of D."""
    for preset in PRESET_NAMES:
        layers, ours, recompute = (row for row in found["mlp"] if row["preset"] == preset)
        assert [layers[key] for key in ("kept", "most", "allocated")] == [2, 3.25, 4.75]
        assert (ours["kept"], recompute["kept"]) == (2, 1)
        # One fewer is made, the gradient of a. With recompute there is none but h, and gradients of x and y beside it.
        assert ours["allocated"] == pytest.approx(layers["allocated"] - 1, abs=0.02)
        assert recompute["most"] == pytest.approx(1.5, abs=0.001)


def test_the_command_prints_and_writes(found, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(traffic, "figures", lambda: found)
    assert main(["--out", str(tmp_path / "traffic.json")]) == 0
    assert "| gpt2-xl | " in capsys.readouterr().out
    assert read_record(tmp_path / "traffic.json", "traffic")["blocks"][0]["preset"] == "gpt2"
