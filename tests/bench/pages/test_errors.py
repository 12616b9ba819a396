import json

import pytest
import torch

from tritium.bench import RESULTS
from tritium.bench.ops import OPERATORS
from tritium.bench.pages import errors
from tritium.bench.pages._tables import DTYPES
from tritium.bench.pages.errors import main, measure
from tritium.bench.record import read_record

pytestmark = pytest.mark.plain


def test_errors_are_relative_to_the_largest_element_of_the_truth():
    rows = measure(OPERATORS["rms_norm"], torch.bfloat16)
    assert [row["value"] for row in rows] == ["output 0", "dx", "dweight"]
    for row in rows:
        assert row["operator"] == "rms_norm"
        assert row["dtype"] == "bfloat16"
        # More than half a rounding to bfloat16, and less than a few.
        assert 2**-10 < row["error"] < 2**-6
        assert 2**-10 < row["pytorch_error"] < 2**-6


def test_the_command_writes_the_errors_of_each_operator_and_dtype(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "OPERATORS", {"swiglu": OPERATORS["swiglu"]})
    out = tmp_path / "errors.json"
    assert main(["--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["runs"] == "reference"
    values = [(row["dtype"], row["value"]) for row in record["rows"]]
    assert values == [(d, value) for d in DTYPES for value in ("output 0", "dgate", "dup")]
    assert "swiglu tritium N=33 F=40 float16 dup" in capsys.readouterr().out


@pytest.mark.parametrize("runs", ["interpreter", "reference"])
def test_the_committed_errors_cover_every_operator_and_dtype(runs):
    """After a new operator: `tritium bench errors`, without and with TRITON_INTERPRET=1."""
    record = read_record(RESULTS / f"errors-{runs}.json", "errors")
    assert record["runs"] == runs
    found = {(row["operator"], row["dtype"]) for row in record["rows"]}
    assert found == {(name, dtype) for name in OPERATORS for dtype in DTYPES}
