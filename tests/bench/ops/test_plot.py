import pytest

from tritium.bench.ops.plot import plot_contest

pytestmark = pytest.mark.plain


def test_a_picture_with_a_line_for_each_contestant_and_the_ceiling(tmp_path, monkeypatch):
    from matplotlib import axes

    lines = []
    original = axes.Axes.plot
    monkeypatch.setattr(
        axes.Axes,
        "plot",
        lambda self, *args, **kw: (
            lines.append((list(args[1]), kw["label"])) or original(self, *args, **kw)
        ),
    )
    entries = [
        {
            "operator": "layer_norm", "label": f"M=8 N={8 * size}", "bound": "bytes",
            "rows": [
                {"contestant": name, "direction": direction, "rate": rate * size}
                for name, rate in (("tritium", 2e9), ("eager", 1e9))
                for direction in ("forward", "backward", "both")
            ],
        }
        for size in (1, 2)
    ]  # fmt: skip
    path = plot_contest(entries, {"bytes_per_second": 5e9, "flops_per_second": 1e12}, tmp_path)
    assert path == tmp_path / "layer_norm.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert lines == [([2.0, 4.0], "tritium"), ([1.0, 2.0], "eager")] * 2
