import json

import pytest

from tritium.train.run.plots import _running_mean, plot_loss

pytestmark = pytest.mark.plain


def test_plot_loss_writes_a_png(tmp_path):
    lines = [{"step": step, "loss": 5 - step / 10} for step in range(20)] + [
        {"step": 20, "val_loss": 3.2}
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_running_mean_of_a_constant_is_the_constant():
    assert _running_mean([2.0] * 50) == pytest.approx([2.0] * 50)
    assert _running_mean([]) == []
