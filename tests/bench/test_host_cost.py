import json

import pytest

from tritium.bench.host_cost import COLUMNS, main, microseconds
from tritium.errors import InputError
from tritium.kernels.core import op

pytestmark = pytest.mark.plain


def test_rows_hold_microseconds_of_each_call(tmp_path, capsys):
    direct = op.device_of
    out = tmp_path / "host.json"
    assert main(["rms_norm", "--rounds", "1", "--out", str(out)]) == 0
    bare, row = json.loads(out.read_text())["rows"]
    assert bare["operator"] == "without arithmetic"
    assert (row["operator"], row["label"]) == ("rms_norm", "M=8 N=8")
    assert list(row["microseconds"]) == list(COLUMNS)
    assert all(value > 0 for value in row["microseconds"].values())
    assert "rms_norm" in capsys.readouterr().out
    assert op.device_of is direct


def test_a_figure_is_the_median_of_the_fastest_calls_of_rounds():
    times = iter([1.0] * 10 + [5e-6, *[9e-6] * 9, *[7e-6] * 10, *[6e-6] * 10])
    assert microseconds({"call": lambda: next(times)}, rounds=3) == {"call": 6.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rms_nrom"], "unknown operator 'rms_nrom'; did you mean 'rms_norm'"),
        (["rms_norm", "--rounds", "0"], "rounds: expected 1 or more, got 0"),
        (["--foo"], "--foo.*; see tritium bench host --help"),
    ],
)
def test_bad_options_raise(words, message):
    with pytest.raises(InputError, match=message):
        main(words)
