import json

import pytest
from matplotlib.figure import Figure

from tritium.train.run.metrics import read_metrics
from tritium.train.run.plots import _draw_more, _tokens_per_step, plot_loss, running_mean, shown

pytestmark = pytest.mark.plain


def test_plot_loss_writes_a_png(tmp_path):
    lines = [{"step": step, "loss": 5.0, "lr": 0.1, "grad_norm": 1.0} for step in range(20)]
    lines += [{"step": 20, "val_loss": 3.2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_loss_is_drawn_at_the_number_of_steps_done(tmp_path, monkeypatch):
    lines = [{"step": step, "loss": 5.0, "lr": 0.1, "grad_norm": 1.0} for step in range(2)]
    lines += [{"step": 2, "val_loss": 3.2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_loss(tmp_path)
    assert {line.get_label(): list(line.get_xdata()) for line in drawn[0].axes[0].lines} == {
        "training, each step": [1, 2],
        "training, running mean": [1, 2],
        "validation": [2],
    }


def test_other_evaluations_get_a_panel(tmp_path):
    lines = [{"step": step, "loss": 5.0, "tokens": 64 * (step + 1)} for step in range(4)]
    lines = [each | {"lr": 0.1, "grad_norm": 1.0} for each in lines]
    first = {"step": 2, "val_loss": 3.2, "val_bits_per_byte": 2.0, "text/wiki/loss": 4.0}
    first |= {"text/wiki/bits_per_byte": 2.5, "choice/tiny/accuracy_sum": 0.25}
    lines += [first, first | {"step": 4, "choice/tiny/accuracy_sum": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    figure = Figure()
    below = figure.subplots()
    training, evaluations = read_metrics(tmp_path)
    _draw_more(below, evaluations, _tokens_per_step(training))
    left, right = figure.axes
    assert {line.get_label(): list(line.get_ydata()) for line in (*left.lines, *right.lines)} == {
        "validation": [2.0, 2.0],
        "wiki": [2.5, 2.5],
        "tiny/accuracy_sum": [0.25, 0.5],
    }
    assert list(left.lines[0].get_xdata()) == [128, 256]
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_the_measures_of_a_task_are_drawn():
    evaluation = {"step": 2, "val_loss": 0.5, "val_accuracy": 0.75, "val_margin": -0.25}
    figure = Figure()
    _draw_more(figure.subplots(), [evaluation], 1.0)
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[-0.25]]
    assert [list(line.get_ydata()) for line in right.lines] == [[0.75]]
    assert left.get_ylabel() == ""


def test_the_name_of_a_text_does_not_make_its_loss_an_accuracy():
    evaluation = {"step": 2, "val_loss": 3.0, "text/f1/loss": 4.0, "text/f1/bits_per_byte": 2.5}
    evaluation |= {"choice/accuracy/last_word_perplexity": 90.0}
    figure = Figure()
    _draw_more(figure.subplots(), [evaluation], 1.0)
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2.5]]
    assert not right.lines


def test_running_mean_of_a_constant_is_the_constant():
    assert running_mean([2.0] * 50) == pytest.approx([2.0] * 50)
    assert running_mean([]) == []


@pytest.mark.parametrize("name", [r"$\frac$", "$10-$20", "_old", "k\udcefl", "a_b", "50 $"])
def test_any_name_is_drawn_as_it_is(name, tmp_path):
    axes = Figure().subplots()
    axes.plot([0, 1], label=shown(name))
    legend = axes.legend()
    assert len(legend.get_texts()) == 1
    axes.figure.savefig(tmp_path / "a.svg")
    (text,) = legend.get_texts()
    drawn, is_math = text._preprocess_math(text.get_text())
    assert not is_math
    assert drawn.strip() == name.replace("\udcef", "?")
