import json
from dataclasses import replace

import pytest
import torch

from tritium.bench.record import read_record
from tritium.bench.training import efficiency
from tritium.bench.training import predict as module
from tritium.bench.training.efficiency import GAP_SECONDS, LIMITS
from tritium.bench.training.predict import compare, main, rows_of
from tritium.bench.training.step import Work
from tritium.errors import InputError
from tritium.train.recipes import RECIPES

pytestmark = pytest.mark.plain

TINY = replace(
    RECIPES["shakespeare-char"].with_options(
        n_layer=1, n_head=2, d_model=64, context_tokens=32, batch_size=4, micro_batch_size=2
    ),
    tokenizer="bytes",
)


@pytest.fixture
def tiny(monkeypatch):
    """A recipe that takes seconds on a CPU."""
    monkeypatch.setitem(RECIPES, "tiny", TINY)


def test_equal_work_is_one_row_and_its_time_is_floor_by_efficiency_and_gap():
    limits = LIMITS["h100"]
    work = Work(operators=("tritium::layer_norm_fwd",), kernel="layer_norm_fwd", nbytes=3 * 10**9)
    (row,) = rows_of([(work, 1), (work, 2)], limits)
    assert (row["calls"], row["bytes"], row["part"]) == (3, 9 * 10**9, "norms")
    assert row["floor_seconds"] == pytest.approx(3e-3)
    assert row["seconds"] == pytest.approx(3e-3 + 3 * GAP_SECONDS)


def test_a_step_is_printed_and_written(tiny, tmp_path, capsys):
    out = tmp_path / "predict.json"
    assert main(["tiny", "--gpu", "h100", "--batch-size", "8", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "ESTIMATE of a step: tiny on h100, 8 x 32 tokens in micro-batches of 2" in text
    assert "tokens/s, MFU" in text
    (step,) = read_record(out, "predict")["steps"]
    assert (step["batch"], step["micro_batch"]) == (8, 2)
    total = sum(row["seconds"] for row in step["rows"])
    assert step["gpu_seconds"] == pytest.approx(total) == pytest.approx(sum(step["parts"].values()))
    assert list(step["parts"].values()) == sorted(step["parts"].values(), reverse=True)
    # So small a model waits for the host.
    assert step["seconds"] == step["host_seconds"]["compiled"] > step["gpu_seconds"]
    assert step["tokens_per_second"] == pytest.approx(8 * 32 / step["seconds"])


def test_short_rows_are_added_up_on_the_screen(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "SMALL_SHARE", 0.02)
    out = tmp_path / "predict.json"
    assert main(["tiny", "--gpu", "h100", "--out", str(out)]) == 0
    (step,) = read_record(out, "predict")["steps"]
    small = [row for row in step["rows"] if row["seconds"] < 0.02 * step["gpu_seconds"]]
    (line,) = [row for row in capsys.readouterr().out.splitlines() if " others " in row]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[1] == f"{len(small)} others"
    assert cells[3] == f"{sum(row['calls'] for row in small):,}"
    assert cells[-1] == f"{1e3 * sum(row['seconds'] for row in small):.2f}"


def test_one_pass_is_predicted_where_it_fits(tiny, tmp_path, capsys, monkeypatch):
    """The rows of the golden table are not needed: every loop has 500 instructions here."""
    golden = {"hottest_loop": {"instructions": 500}, "num_warps": 8, "blocks_per_sm": 1}
    monkeypatch.setattr(efficiency, "_golden_row", lambda *_: {**golden, "serialized": False})
    found = {}
    for micro_batch in (132, 66):
        out = tmp_path / "predict.json"
        words = ["tiny", "--batch-size", "132", "--micro-batch-size", str(micro_batch)]
        assert main([*words, "--gpu", "h200", "--one-pass", "--out", str(out)]) == 0
        assert "backward of attention in one pass" in capsys.readouterr().out
        (step,) = read_record(out, "predict")["steps"]
        assert step["one_pass"]
        found[micro_batch] = {row["kernel"] for row in step["rows"]}
    kernel = "_causal_attention_bwd_one_pass_kernel"
    # A sequence has 2 heads: two waves, or one.
    assert kernel in found[132]
    assert kernel not in found[66]


def test_without_a_recipe_the_totals_of_all_steps_are_written(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "STEPS", (("tiny", 2, 2), ("tiny", None, None)))
    out = tmp_path / "predict.json"
    assert main(["--out", str(out)]) == 0
    steps = read_record(out, "predict")["steps"]
    sizes = [(step["gpu_name"], step["batch"], step["micro_batch"]) for step in steps]
    assert sizes == [("h100", 2, 2), ("h200", 2, 2), ("h100", 4, 2), ("h200", 4, 2)]
    assert not any("rows" in step for step in steps)
    assert "| tiny, 4 x 32 tokens in micro-batches of 2 | h200 | " in capsys.readouterr().out


def test_a_measured_profile_is_shown_next_to_the_prediction(tiny, tmp_path, capsys):
    out = tmp_path / "predict.json"
    assert main(["tiny", "--gpu", "h200", "--measure", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "measured on this CPU: NO GPU WAS MEASURED" in text or torch.cuda.is_available()
    measured = json.loads(out.read_text())["steps"][0]["measured"]
    assert measured["seconds"] == pytest.approx(sum(row["seconds"] for row in measured["rows"]))
    assert {"attention", "norms", "optimizer"} <= {row["part"] for row in measured["rows"]}


def test_predicted_and_measured_rows_are_joined_by_part_and_operator():
    predicted = [
        {"part": "MLP", "operator": "aten::mm", "seconds": 1.0},
        {"part": "MLP", "operator": "aten::mm", "seconds": 2.0},
        {"part": "norms", "operator": "a", "seconds": 1.0},
    ]
    measured = [
        {"part": "MLP", "operator": "aten::mm", "seconds": 4.0},
        {"part": "other", "operator": "triton_poi_fused", "seconds": 0.5},
    ]
    rows = [tuple(row.values()) for row in compare(predicted, measured)]
    assert rows == [
        ("MLP", "aten::mm", 3.0, 4.0),
        ("norms", "a", 1.0, 0.0),
        ("other", "triton_poi_fused", 0.0, 0.5),
    ]
    marks = [module._comparison_cells(row)[-1] for row in compare(predicted, measured)]
    assert marks == ["1.33 !", "- !", "- !"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gtp2"], "unknown recipe 'gtp2'; did you mean 'gpt2'"),
        (["--batch-size", "8"], "expected a recipe with them"),
        (["gpt2", "--batch-size", "0"], "batch_size: expected 1 or more, got 0"),
        (["gpt2", "--measure", "-1"], "--measure: expected 0 or more, got -1"),
        (
            ["gpt2", "--batch-size", "8", "--micro-batch-size", "3"],
            "expected a divisor of the 8 sequences",
        ),
    ],
)
def test_bad_options_raise(words, message):
    with pytest.raises(InputError, match=message):
        main(words)
