import pytest

from tritium.bench.ops.plot import plot_operator

pytestmark = pytest.mark.plain


def test_the_plot_has_a_line_per_implementation_and_direction(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, plot = [], Axes.plot

    def record_and_plot(self, *args, **options):
        lines.append((list(args[1]), options["label"]))
        return plot(self, *args, **options)

    monkeypatch.setattr(Axes, "plot", record_and_plot)
    rates = {"tritium": 2e9, "eager": 1e9}
    entries = [
        {
            "operator": "layer_norm",
            "label": f"M=8 N={8 * size}",
            "bound": "bytes",
            "rows": [
                {"implementation": name, "direction": direction, "rate": rate * size}
                for name, rate in rates.items()
                for direction in ("forward", "backward", "both")
            ],
        }
        for size in (1, 2)
    ]
    path = plot_operator(entries, {"bytes_per_second": 5e9, "flops_per_second": 1e12}, tmp_path)
    assert path == tmp_path / "layer_norm.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert lines == [([2.0, 4.0], "tritium"), ([1.0, 2.0], "eager")] * 2
