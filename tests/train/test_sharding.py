"""Whatever ranks divide, and however many, a run is that of one process, to float32's rounding."""

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from tritium.train.log import read_metrics

pytestmark = pytest.mark.plain

STEPS = 20
MODELS = {
    "gpt2": [],
    "llama": ["--position", "rotary", "--norm", "rms", "--mlp", "swiglu", "--n-kv-head", 2, "--micro-batch-size", 2],
}
ENGINES = {
    "alone": (0, []),
    "ddp": (2, []),
    "zero1": (2, ["--parallel", "zero1"]),
    "fsdp": (2, ["--parallel", "fsdp"]),
    "tensor": (2, ["--tensor-parallel", 2]),
    "hsdp": (4, ["--parallel", "fsdp", "--shard-ranks", 2]),
    "fsdp-tensor": (4, ["--parallel", "fsdp", "--tensor-parallel", 2]),
}


def losses(run, start: int = 0) -> list[float]:
    rows = read_metrics(run)[0]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["loss"] for row in rows][start:]


def assert_same(found: list[float], expected: list[float]) -> None:
    """In each step gradients and loss are summed in another order, off by a rounding of their size; 20 of these add up."""
    np.testing.assert_allclose(found, expected, rtol=STEPS * np.finfo(np.float32).eps, atol=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def words(runs, monkeypatch) -> list:
    """Options of a run of two epochs, each of which ends with a short window."""
    monkeypatch.setenv("TRITIUM_HOME", str(runs / "home"))
    corpus = runs / "corpus.txt"
    corpus.write_text("\n".join(str(number * number) for number in range(550)))
    options = {
        "data": corpus, "tokenizer": "bytes", "device": "cpu", "n-layer": 2, "n-head": 4, "d-model": 32, "context-tokens": 32,
        "steps": STEPS, "batch-size": 8, "warmup-steps": 2, "lr": 3e-3, "eval-interval": 100, "checkpoint-interval": 10,
        "keep-checkpoints": 5, "sample-tokens": 2, "prompt": "1",
    }  # fmt: skip
    return ["laptop", *(word for name, value in options.items() for word in (f"--{name}", value))]


@pytest.fixture
def once(runs, words, launch):
    """The folder of a run of a model by an engine, done when first asked for."""

    def run(model: str, engine: str):
        folder = runs / f"{model}-{engine}"
        if not folder.exists():
            ranks, options = ENGINES[engine]
            status, _, err = launch(ranks, *words, *MODELS[model], *options, "--out", folder)
            assert status == [0] * len(status), err
        return folder

    return run


@pytest.mark.parametrize(
    ("model", "engine"),
    [("gpt2", engine) for engine in ENGINES if engine != "alone"]
    + [("llama", engine) for engine in ("ddp", "hsdp", "fsdp-tensor")],
)
def test_losses_are_those_of_one_process(model, engine, once):
    alone, run = once(model, "alone"), once(model, engine)
    assert_same(losses(run), losses(alone))
    found, expected = (read_metrics(folder)[1][-1]["val_loss"] for folder in (run, alone))
    assert_same(found, expected)
    norms = [[row["grad_norm"] for row in read_metrics(folder)[0]] for folder in (run, alone)]
    assert_same(*norms)
    assert (run / "samples.txt").read_text() == (alone / "samples.txt").read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [("alone", "fsdp"), ("fsdp", "alone"), ("fsdp", "fsdp-tensor"), ("zero1", "hsdp"), ("tensor", "zero1"), ("ddp", "tensor")],
)
def test_any_ranks_resume_a_run_of_others(before, after, once, launch, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(once("gpt2", before), broken)
    shutil.rmtree(broken / "checkpoints" / "step-20")
    ranks, options = ENGINES[after]
    status, _, err = launch(ranks, "--resume", broken, *options)
    assert status == [0] * len(status), err
    assert_same(losses(broken), losses(once("gpt2", "alone")))
    contents = []
    for run in (broken, once("gpt2", "alone")):
        folder = run / "checkpoints" / "step-20"
        contents.append([load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer")])
    for found, expected in zip(*contents, strict=True):
        assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in expected.items()}
    assert contents[0][1]["wte.weight.step"] == STEPS


def test_weights_are_the_same_before_the_first_step(once):
    """Whoever divides them: no row changes place."""
    folders = [once("gpt2", engine) / "checkpoints" / "step-0" for engine in ("alone", "tensor", "hsdp")]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
