import pytest
from matplotlib.figure import Figure

pytestmark = pytest.mark.plain


def test_bad_input_is_one_line(error_of, tmp_path):
    assert "plot: expected one run or more, got none" in error_of("plot")
    assert "expected the folder of a run" in error_of("plot", tmp_path)
    assert "invalid choice 'days'" in error_of("plot", tmp_path, "--x", "days")


def test_a_run_is_drawn(tritium, tiny, tmp_path):
    assert tritium(*tiny, "--steps", 2)[0] == 0
    status, out, _ = tritium("plot", tmp_path / "run", "--out", tmp_path / "a.png")
    assert (status, out) == (0, f"written: {tmp_path / 'a.png'}\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_axis_is_the_chosen_one(tritium, tiny, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    assert tritium(*tiny, "--steps", 2)[0] == 0
    run = tmp_path / "run"
    assert tritium("plot", run, "--x", "tokens", "--out", tmp_path / "a.png")[0] == 0
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [64, 128]
