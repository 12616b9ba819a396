"""The comparison on a tiny model: figures, errors and printing, not its speed."""

import time

import pytest
import torch

from tests.bench.training.test_implementations import CPU, TINY
from tritium.bench.record import read_record
from tritium.bench.training import training
from tritium.bench.training.baseline import Baseline
from tritium.bench.training.implementations import make_implementations
from tritium.bench.training.training import _warm_up, main, random_batch, train_in_turn
from tritium.errors import InputError
from tritium.train.config import TrainConfig
from tritium.train.recipes import RECIPES

pytestmark = pytest.mark.plain

SHAPE = TINY.gpt(vocab_size=300)


@pytest.fixture(autouse=True)
def tiny_recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", TINY)


def on_cpu(*words):
    return main(["tiny", "--device", "cpu", "--steps", "3", *words])


def test_models_have_no_dropout(monkeypatch, tmp_path):
    monkeypatch.setitem(RECIPES, "tiny", TINY.with_options(dropout=0.5, attention_dropout=0.5))
    path = tmp_path / "train.json"
    assert on_cpu("--out", str(path)) == 0  # with dropout the models do not agree
    shape = read_record(path, "train")["shape"]
    assert shape["dropout"] == shape["attention_dropout"] == 0


def test_models_train_with_adamw_whatever_the_recipe_has(monkeypatch):
    configs = []
    monkeypatch.setitem(RECIPES, "tiny", TINY.with_options(optimizer="muon", lr=0.02))
    monkeypatch.setattr(training, "measure", lambda config, *_: configs.append(config) or {})
    with pytest.raises(KeyError):  # no figures to print
        on_cpu()
    assert (configs[0].optimizer, configs[0].lr) == ("adamw", 1e-3)


def test_a_cuda_graph_can_be_turned_off(monkeypatch):
    configs = []
    monkeypatch.setattr(training, "measure", lambda config, *_: configs.append(config) or {})
    for words in ((), ("--cuda-graph", "off")):
        with pytest.raises(KeyError):  # no figures to print
            on_cpu(*words)
    assert [config.execution.cuda_graph for config in configs] == ["auto", "off"]


def test_figures_are_written_and_printed(tmp_path, capsys):
    path = tmp_path / "new" / "train.json"
    assert on_cpu("--out", str(path)) == 0
    record = read_record(path, "train")
    assert record["recipe"] == "tiny"
    assert record["shape"]["vocab_size"] == 300
    assert (record["micro_batch_size"], record["context_tokens"], record["steps"]) == (2, 16, 3)
    shown = capsys.readouterr().out
    for name in ("tritium", "baseline"):
        found = record["implementations"][name]
        seconds = found["step_seconds"]
        assert found["tokens_per_second"] == pytest.approx(2 * 16 / seconds["median"])
        assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
        assert found["mfu"] is None
        assert found["peak_memory_bytes"] is None
        assert len(found["losses"]) == 2 + 3  # after two warm-up steps
        assert found["losses"][-1] < found["losses"][0]
        assert f"| {name} | {found['tokens_per_second']:,.0f} |" in shown
        assert f"last loss {found['losses'][-1]:.4f}" in shown
    ours, baseline = (record["implementations"][name] for name in ("tritium", "baseline"))
    assert ours["losses"] == pytest.approx(baseline["losses"], rel=1e-5)
    assert f"gradient differs by {record['agreement']['tritium']['gradient_gap']:.1e}" in shown


def test_runs_on_this_device(device, tmp_path):
    path = tmp_path / "train.json"
    words = ["--steps", "12", "--compile", "off", "--out", str(path)]
    assert main(["tiny", "--device", str(device), *words]) == 0
    for row in read_record(path, "train")["implementations"].values():
        assert (row["peak_memory_bytes"] is None) == (device.type == "cpu")


def test_compiled_models_are_compared_with_compiled_tritium(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda model, **_: compiled.append(type(model).__name__) or model
    )
    path = tmp_path / "train.json"
    assert on_cpu("--compile", "each", "--out", str(path)) == 0
    assert compiled == ["GPT", "Baseline"]
    rows = read_record(path, "train")["implementations"]
    assert {name: (row["kind"], row["compiled"]) for name, row in rows.items()} == {
        "tritium": ("tritium", False),
        "baseline": ("baseline", False),
        "tritium, compiled": ("tritium", True),
        "baseline, compiled": ("baseline", True),
    }
    for name in ("tritium", "tritium, compiled"):
        assert rows[name]["ratio"] == {"median": 1, "p10": 1, "p90": 1}


def test_a_slow_baseline_is_reported_as_slower(monkeypatch, tmp_path):
    forward = Baseline.forward

    def slow(self, *tokens, **inputs):
        time.sleep(0.05)
        return forward(self, *tokens, **inputs)

    monkeypatch.setattr(Baseline, "forward", slow)
    on_cpu("--out", str(tmp_path / "train.json"))
    rows = read_record(tmp_path / "train.json", "train")["implementations"]
    ours, baseline = rows["tritium"], rows["baseline"]
    assert baseline["tokens_per_second"] < 2 * 16 / 0.05
    assert ours["tokens_per_second"] > baseline["tokens_per_second"]
    assert baseline["ratio"]["median"] > 1


def test_training_that_diverges_raises(monkeypatch):
    wild = TrainConfig.from_options(
        tokenizer="bytes", n_layer=1, d_model=16, context_tokens=8, lr=1e30
    )
    monkeypatch.setitem(RECIPES, "wild", wild)
    with pytest.raises(InputError, match="expected finite losses, got nan"):
        main(["wild", "--device", "cpu", "--steps", "4"])


class StandIn:
    """A model that notes when it trains on which batch."""

    def __init__(self, name, log):
        self.name, self.log, self.losses = name, log, []

    def step(self, batch):
        self.log.append((self.name, batch))
        self.losses.append(0.0)


def test_models_train_on_the_same_batches_in_rounds_of_reversed_order():
    log = []
    models = [StandIn(name, log) for name in "abc"]
    seconds = train_in_turn(models, lambda step: step, 3, CPU)
    assert log == [
        (name, step) for step, names in enumerate(("abc", "cba", "abc")) for name in names
    ]
    assert [[len(one) for one in rounds] for rounds in seconds] == [[1, 1, 1]] * 3


def test_on_cuda_a_round_starts_untimed_and_peaks_exclude_the_other_models(monkeypatch):
    """With a stand-in for CUDA: a second passes with each event, the peak is always 10 MB."""
    clock = iter(range(1000))

    class Event:
        def __init__(self, enable_timing): ...
        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    calls = {"Event": Event, "max_memory_allocated": lambda device: 10_000_000}
    for name in ("Event", "synchronize", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, calls.get(name, lambda device: None))
    pair = make_implementations(TINY, SHAPE, CPU, [False])
    asked = []

    def batch(step):
        asked.append(step)
        return random_batch(TINY, SHAPE, step)

    cuda = torch.device("cuda")
    seconds = train_in_turn(pair, batch, 13, cuda)
    assert seconds == [[[1.0] * 10, [1.0] * 3]] * 2
    assert asked == list(range(11 + 4))
    assert len(pair[0].losses) == len(pair[1].losses) == 11 + 4
    assert _warm_up(pair[0], pair, batch, cuda) == 10_000_000 - pair[1].held_bytes()
    assert _warm_up(pair[0], pair, batch, CPU) is None


def test_other_attentions_take_part_when_asked_for(tmp_path):
    path = tmp_path / "train.json"
    assert on_cpu("--attention", "sdpa", "--out", str(path)) == 0
    record = read_record(path, "train")
    assert list(record["implementations"]) == ["tritium", "tritium, sdpa", "baseline"]
    assert list(record["agreement"]) == ["tritium", "tritium, sdpa"]
    losses = [row["losses"] for row in record["implementations"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_batches_repeat_per_step_and_have_frequent_and_rare_tokens():
    first, again, other = (random_batch(TINY, SHAPE, step) for step in (0, 0, 1))
    assert torch.equal(first.windows, again.windows)
    assert not torch.equal(first.windows, other.windows)
    windows = [random_batch(TINY, SHAPE, step).windows.flatten() for step in range(100)]
    counts = torch.cat(windows).bincount(minlength=300)
    assert counts[0] > 5 * counts[9] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tinny"], "unknown recipe 'tinny'; did you mean 'tiny'"),
        (["tiny", "--steps", "0"], "steps: expected 1 or more, got 0"),
        (["tiny", "--micro-batch-size", "0"], "micro_batch_size: expected 1 or more, got 0"),
        (["tiny", "--compile", "everything"], "invalid choice 'everything'"),
        (["tiny", "--step", "3"], "did you mean --steps"),
        (["tiny", "--device", "meta"], "device: expected"),
        (["tiny", "--out", "."], r"\.: expected a file that can be written, got a folder"),
    ],
)
def test_bad_options_raise_in_one_line(words, message):
    with pytest.raises(InputError, match=message) as caught:
        main(words)
    assert "\n" not in str(caught.value)
