import pytest

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
