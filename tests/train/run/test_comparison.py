import json
import shutil
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from tritium.errors import InputError
from tritium.model.config import AdapterOptions
from tritium.model.cost import flops_per_token
from tritium.train.run import comparison
from tritium.train.run.comparison import Curves, plot_runs
from tritium.train.run.folder import read_run

pytestmark = pytest.mark.plain


@pytest.fixture
def run(tritium, tiny, tmp_path):
    assert tritium(*tiny, "--steps", 3)[0] == 0
    return tmp_path / "run"


def test_axes_grow_with_the_steps(run):
    curves = Curves.read(run)
    assert curves.tokens_per_step == 4 * 16
    steps, tokens, seconds, flops = (
        curves.x_of_steps(axis) for axis in ("steps", "tokens", "seconds", "flops")
    )
    assert steps == {0: 0.0, 1: 1, 2: 2, 3: 3}
    assert tokens[3] == 192
    assert flops[2] == 128 * curves.flops_per_token
    rates = [line["tokens_per_second"] for line in curves.training]
    assert seconds[3] == pytest.approx(sum(64 / rate for rate in rates))


def test_flops_are_those_of_the_rows_and_the_adapter(run, monkeypatch):
    record = read_run(run)
    adapter = AdapterOptions(lora=2)
    changed = replace(record, train=replace(record.train, adapter=adapter, init_from="run"))
    monkeypatch.setattr(comparison, "read_run", lambda _: changed)
    line = {"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 2 * 4 * 8}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert Curves.read(run).flops_per_token == flops_per_token(record.model, 8, adapter)


def test_runs_are_drawn_into_one_file(run, tmp_path):
    file = tmp_path / "all.svg"
    plot_runs([run, run], file, "tokens")
    assert file.read_text().startswith("<?xml")
    with pytest.raises(InputError, match=r"out: expected a file that ends in \.png"):
        plot_runs([run], tmp_path / "all.txt", "steps")


def test_a_loss_is_drawn_at_the_number_of_steps_done(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_runs([run], tmp_path / "all.svg", "steps")
    training, evaluations = drawn[0].axes[0].lines
    assert list(training.get_xdata()) == [1, 2, 3]
    assert list(evaluations.get_xdata()) == [3]


def test_runs_with_any_names_are_drawn(run, tmp_path):
    names = (r"$\frac$", "_old")
    copies = [shutil.copytree(run, tmp_path / name) for name in names]
    plot_runs(copies, tmp_path / "all.svg", "steps")
    drawn = (tmp_path / "all.svg").read_text()
    for name in names:
        assert f"{name} -->" in drawn
        assert f"{name}, validation -->" in drawn


def test_lines_that_cannot_be_read_are_counted_and_left_out(run, capsys):
    before = len(Curves.read(run).training)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo\n\n')
    capsys.readouterr()
    assert len(Curves.read(run).training) == before
    error = capsys.readouterr().err
    assert "metrics.jsonl: 2 of " in error
    assert error.endswith(" lines cannot be read and are left out\n")


def test_a_folder_without_steps_raises(run, tmp_path):
    (run / "metrics.jsonl").write_text(json.dumps({"iter": 1, "loss": 2.0}) + "\n")
    with pytest.raises(InputError, match="expected lines with step, loss, lr and grad_norm"):
        Curves.read(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"expected metrics\.jsonl, found none"):
        Curves.read(run)
    with pytest.raises(InputError, match="expected the folder of a run"):
        Curves.read(tmp_path)
