"""The comparison, run for real on a tiny model: its figures, its refusals and its printing, not its speed."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tritium.bench.record import read_record
from tritium.bench.training import training
from tritium.bench.training.baseline import Baseline
from tritium.bench.training.implementations import make_contestants
from tritium.bench.training.training import (
    check_agreement,
    main,
    profiled,
    random_batch,
    render,
)
from tritium.errors import InputError
from tritium.model.attention import ATTENTIONS
from tritium.train.config import TrainConfig
from tritium.train.recipes import RECIPES

pytestmark = pytest.mark.plain

TINY = TrainConfig.from_options(
    tokenizer="bpe:300", n_layer=1, n_head=2, d_model=16, context_tokens=16, batch_size=4, micro_batch_size=2, lr=1e-2,
    warmup_steps=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", TINY)


def on_cpu(*words):
    return main(["tiny", "--device", "cpu", "--steps", "3", "--warmup-steps", "1", *words])


def change_logits(monkeypatch, change):
    """Make the baseline another model."""
    forward = Baseline.forward

    def changed(self, tokens, targets=None):
        logits = change(forward(self, tokens))
        return (
            logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        )

    monkeypatch.setattr(Baseline, "forward", changed)


def test_figures_are_written_and_both_losses_printed(tmp_path, capsys):
    path = tmp_path / "new" / "train.json"
    assert on_cpu("--out", str(path)) == 0
    record = read_record(path, "train")
    assert record["recipe"] == "tiny"
    assert record["shape"]["vocab_size"] == 300
    assert (record["micro_batch_size"], record["context_tokens"], record["steps"]) == (2, 16, 3)
    shown = capsys.readouterr().out
    for name in ("tritium", "baseline"):
        found = record["contestants"][name]
        assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["step_seconds"]["median"])
        assert (
            0
            < found["step_seconds"]["p10"]
            <= found["step_seconds"]["median"]
            <= found["step_seconds"]["p90"]
        )
        assert found["mfu"] is None
        assert found["peak_memory_bytes"] is None
        assert len(found["losses"]) == 1 + 3
        assert found["losses"][-1] < found["losses"][0]
        assert f"{name:20}" + "".join(f"{loss:10.4f}" for loss in found["losses"]) in shown
        rows = record["profile"][name]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        # Which operators are the slowest is as the machine has it; that some ran at all is not.
        assert any(row["calls"] for row in rows)
    assert record["contestants"]["tritium"]["losses"] == pytest.approx(
        record["contestants"]["baseline"]["losses"], rel=1e-5
    )
    assert "no MFU: device not in the table" in shown
    assert "no Triton kernel runs on a CPU" in shown
    assert "peak memory is not measured" in shown
    assert render(record) in shown


def test_what_a_gpu_adds_is_shown(tmp_path):
    path = tmp_path / "train.json"
    on_cpu("--out", str(path))
    record = json.loads(path.read_text()) | {"device": "cuda", "gpu": "NVIDIA H200"}
    for row in record["contestants"].values():
        row |= {"mfu": 0.456, "peak_memory_bytes": 1_500_000_000}
    shown = render(record)
    assert "tiny on NVIDIA H200" in shown
    assert "45.6%       1.50 GB" in shown
    assert "no " not in shown.replace("  no  ", "")


def test_runs_on_this_device(device, tmp_path):
    path = tmp_path / "train.json"
    words = ["--steps", "12", "--compile", "off", "--out", str(path)]
    assert main(["tiny", "--device", str(device), *words]) == 0
    for row in read_record(path, "train")["contestants"].values():
        assert (row["peak_memory_bytes"] is None) == (device.type == "cpu")


def test_with_and_without_compilation_in_one_run(monkeypatch, tmp_path, capsys):
    """Each is compared with tritium as it is itself compiled."""
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda model, **_: compiled.append(type(model).__name__) or model
    )
    path = tmp_path / "train.json"
    assert on_cpu("--compile", "each", "--out", str(path)) == 0
    assert compiled == ["GPT", "Baseline"]
    rows = read_record(path, "train")["contestants"]
    assert {name: (row["kind"], row["compiled"]) for name, row in rows.items()} == {
        "tritium": ("tritium", False),
        "baseline": ("baseline", False),
        "tritium, compiled": ("tritium", True),
        "baseline, compiled": ("baseline", True),
    }
    for name in ("tritium", "tritium, compiled"):
        assert rows[name]["ratio"] == {"median": 1, "p10": 1, "p90": 1}
    shown = capsys.readouterr().out
    for name in ("baseline", "baseline, compiled"):
        assert f"times the tokens/s of {name} (p10" in shown


@pytest.mark.parametrize(
    "change", [lambda z: 1.01 * z, lambda z: z.roll(1, dims=1), lambda z: z * torch.nan]
)
def test_another_model_is_refused(monkeypatch, tmp_path, change):
    change_logits(monkeypatch, change)
    with pytest.raises(
        InputError,
        match=r"baseline's (loss|gradient) on the first batch to part by rounding, up to .*, got",
    ):
        on_cpu("--out", str(tmp_path / "train.json"))
    assert not list(tmp_path.iterdir())


def test_a_gradient_alone_that_is_wrong_is_refused(monkeypatch):
    # The value stays, half of the gradient is gone.
    change_logits(monkeypatch, lambda z: z.detach() + 0.5 * (z - z.detach()))
    with pytest.raises(InputError, match="baseline's gradient on the first batch"):
        on_cpu()


def test_a_missing_mask_is_beyond_the_rounding_of_bf16(monkeypatch):
    config, shape, device = (
        TINY.with_options(precision="bfloat16"),
        TINY.gpt(vocab_size=300),
        torch.device("cpu"),
    )
    batch = random_batch(config, shape, 0)
    pair = make_contestants(config, shape, device, [False])
    found = check_agreement(config, *pair, batch)
    assert all(
        parameter.grad is None for contestant in pair for parameter in contestant.model.parameters()
    )
    assert found["gradient_gap"] > 1e-4, "bfloat16 had no effect"
    # The baseline's alone: on a CPU it is tritium's too.
    unmasked = {
        "scaled_dot_product_attention": lambda q, k, v, **_: F.scaled_dot_product_attention(q, k, v)
    }
    monkeypatch.setattr("tritium.bench.training.baseline.F", SimpleNamespace(**vars(F) | unmasked))
    with pytest.raises(InputError, match="gradient"):
        check_agreement(config, *make_contestants(config, shape, device, [False]), batch)


def test_a_slow_baseline_is_reported_slower(monkeypatch, tmp_path):
    forward = Baseline.forward

    def slow(self, *tokens):
        time.sleep(0.05)
        return forward(self, *tokens)

    monkeypatch.setattr(Baseline, "forward", slow)
    on_cpu("--out", str(tmp_path / "train.json"))
    record = read_record(tmp_path / "train.json", "train")
    ours, theirs = (
        record["contestants"][name]["tokens_per_second"] for name in ("tritium", "baseline")
    )
    assert theirs < 2 * 16 / 0.05
    assert ours > theirs
    assert record["contestants"]["baseline"]["ratio"]["median"] > 1


def test_training_that_diverges_is_an_error(monkeypatch):
    monkeypatch.setitem(
        RECIPES,
        "wild",
        TrainConfig.from_options(
            tokenizer="bytes", n_layer=1, d_model=16, context_tokens=8, lr=1e30
        ),
    )
    with pytest.raises(InputError, match="expected finite losses, got nan"):
        main(["wild", "--device", "cpu", "--steps", "4"])


def test_on_a_gpu_the_first_step_of_a_round_is_not_timed_and_the_others_state_is_not_counted(
    monkeypatch,
):
    """Events and memory of a stand-in for CUDA: a second passes with each event, 10 MB are the peak."""
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
    shape = TINY.gpt(vocab_size=300)
    pair = make_contestants(TINY, shape, torch.device("cpu"), [False])
    asked = []

    def batch(step):
        asked.append(step)
        return random_batch(TINY, shape, step)

    seconds, peaks = training._rounds(pair, batch, 13, torch.device("cuda"))
    assert seconds == [[[1.0] * 10, [1.0] * 3]] * 2
    assert asked == list(range(11 + 4))
    assert len(pair[0].losses) == len(pair[1].losses) == 11 + 4
    # The first round of tritium runs before the baseline has any optimizer state.
    weights = sum(parameter.nbytes for parameter in pair[1].model.parameters())
    assert peaks == [10_000_000 - weights, 10_000_000 - pair[0].held_bytes()]


def test_other_attentions_take_part_where_they_are_asked_for(tmp_path, capsys):
    path = tmp_path / "train.json"
    assert on_cpu("--attention", "sdpa", "--out", str(path)) == 0
    record = read_record(path, "train")
    assert list(record["contestants"]) == ["tritium", "tritium, sdpa", "baseline"]
    assert list(record["agreement"]) == ["tritium", "tritium, sdpa"]
    assert record["contestants"]["tritium"]["ratio"] == {"median": 1, "p10": 1, "p90": 1}
    losses = [row["losses"] for row in record["contestants"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    shown = capsys.readouterr().out
    assert "\ntritium, sdpa " in shown
    other = record["contestants"]["tritium, sdpa"]
    advice = "train with --attention sdpa here: "
    for spread, is_told in (
        ({"median": 0.8, "p10": 0.7, "p90": 0.9}, True),
        ({"median": 0.8, "p10": 0.7, "p90": 1.1}, False),
    ):
        other["ratio"] = spread
        assert (f"{advice}1.25 times the tokens/s" in render(record)) == is_told
        assert is_told or advice not in render(record)


def test_another_attention_that_is_wrong_is_refused(monkeypatch):
    row = ATTENTIONS["sdpa"]
    monkeypatch.setitem(
        ATTENTIONS,
        "sdpa",
        replace(row, attend=lambda q, k, v, documents: row.attend(q, k, v, documents) * 1.1),
    )
    with pytest.raises(InputError, match="expected tritium, sdpa's and the baseline's"):
        on_cpu("--attention", "sdpa")


def test_a_profile_ends_with_what_it_leaves_out(monkeypatch):
    monkeypatch.setattr(training, "PROFILE_ROWS", 2)
    contestant = make_contestants(TINY, TINY.gpt(vocab_size=300), torch.device("cpu"), [False])[0]
    first, second, rest = profiled(
        contestant, random_batch(TINY, contestant.shape, 0), torch.device("cpu")
    )
    assert first["seconds"] >= second["seconds"] > 0
    assert (rest["part"], rest["operator"], rest["calls"]) == ("everything else", "", None)
    assert rest["share"] == pytest.approx(1 - first["share"] - second["share"])


def test_batches_repeat_and_have_frequent_and_rare_tokens():
    shape = TINY.gpt(vocab_size=300)
    first, again, other = (random_batch(TINY, shape, step) for step in (0, 0, 1))
    assert torch.equal(first.windows, again.windows)
    assert not torch.equal(first.windows, other.windows)
    many = torch.cat(
        [random_batch(TINY, shape, step).windows.flatten() for step in range(100)]
    ).bincount(minlength=300)
    assert many[0] > 5 * many[9] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tyni"], "no recipe 'tyni'; near: tiny"),
        (["tiny", "--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["tiny", "--warmup-steps", "-1"], "--warmup-steps: expected 0 or more, got -1"),
        (["tiny", "--micro-batch-size", "0"], "--micro-batch-size: expected 1 or more, got 0"),
        (["tiny", "--compile", "everything"], "invalid choice 'everything'"),
        (["tiny", "--step", "3"], "did you mean --steps"),
        (["tiny", "--device", "meta"], "--device: expected"),
        (["tiny", "--out", "."], r"\.: expected a file that can be written, got a folder"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(InputError, match=message) as caught:
        main(words)
    assert "\n" not in str(caught.value)
