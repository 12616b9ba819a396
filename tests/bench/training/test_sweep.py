"""tritium bench sweep: rows of a file, equal processor time, figures in the record."""

import json

import pytest

from tritium.bench.training import sweep
from tritium.errors import InputError
from tritium.train.config import PYTHON_PROMPT
from tritium.train.recipes import recipe

pytestmark = pytest.mark.plain

TINY = {"n_layer": 1, "n_head": 1, "d_model": 16, "context_tokens": 16, "batch_size": 2}


def write(file, rows):
    file.write_text(json.dumps(rows))
    return str(file)


def test_row_is_trained_and_recorded(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    options = TINY | {"data": [str(text)], "tokenizer": "bytes"}
    out = tmp_path / "sweep.json"
    rows = [
        {"name": "tiny", "options": options},
        {"name": "three steps", "options": options | {"steps": 3}},
    ]
    file = write(tmp_path / "rows.json", rows)
    assert sweep.main([file, "--seconds", "0.05", "--out", str(out)]) == 0
    row, with_steps = json.loads(out.read_text())["rows"]
    assert with_steps["steps"] == 3
    assert "samples" not in row  # not trained on Python
    expected = max(1, int(0.05 / row["step_processor_seconds"]))
    assert row["name"] == "tiny"
    assert row["steps"] == expected
    assert row["tokens"] == expected * 2 * 16
    assert 1 < row["bits_per_byte"] < 9


def test_broken_samples_are_counted_if_the_prompt_is_that_of_python(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 200)
    sizes = {"steps": 1, "tokenizer": "bytes", "prompt": PYTHON_PROMPT}
    options = TINY | sizes | {"data": (str(text),)}
    seen = []
    monkeypatch.setattr(sweep, "_SAMPLES", 3)
    monkeypatch.setattr(sweep, "is_broken", lambda text: seen.append(text) or len(seen) < 3)
    config = recipe("laptop").with_options(**options)
    row = sweep.train_row("laptop", config, options, 1.0)
    assert (row["broken_samples"], row["samples"]) == (2, 3)
    assert len(set(seen)) == 3
    assert all(sample.startswith(PYTHON_PROMPT) for sample in seen)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected a list of"),
        ({"name": "a"}, "expected a list of"),
        ([{"options": {}}], "expected a list of"),
        ([{"name": "a", "options": {"optimizr": "muon"}}], "row 1: unknown option 'optimizr'"),
        ([{"name": "a", "optoins": {}}], "row 1: unknown key 'optoins'; did you mean 'options'"),
        ([{"name": "a"}, {"name": "b", "options": [1]}], "row 2: options: expected an object"),
        ([{"name": "a", "options": {"steps": "many"}}], "row 1: steps: expected int, got 'many'"),
        ([{"name": "a", "options": {"device": "cpu"}}], "row 1: device: expected no value"),
        ([{"name": "a", "options": {"tokenizer": None}}], "row 1: tokenizer: .* bpe:SIZE .* None"),
        ([{"name": "a", "options": {"tokenizer": "x.json"}}], "row 1: tokenizer: .* got 'x.json'"),
    ],
)
def test_bad_rows_raise(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        sweep.read_rows(tmp_path / write(tmp_path / "rows.json", rows), "laptop")


@pytest.mark.parametrize("seconds", ["0", "inf", "nan"])
def test_no_time_or_endless_time_raises(tmp_path, seconds):
    with pytest.raises(InputError, match=f"--seconds: expected a finite .* got {seconds}"):
        sweep.main([write(tmp_path / "rows.json", [{"name": "a"}]), "--seconds", seconds])


def test_a_missing_file_is_named_once(tmp_path):
    expected = (
        r"^/[^\[]*/rows\.json: expected a JSON file with rows, got: No such file or directory$"
    )
    with pytest.raises(InputError, match=expected):
        sweep.main([str(tmp_path / "rows.json")])
