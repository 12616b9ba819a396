"""Runs on several ranks match the run of one process to the rounding of float32."""

import contextlib
import fcntl
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tritium.train.run.folder import read_run
from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain

STEPS = 10
LLAMA = (
    "--position rotary --norm rms --mlp swiglu --n-kv-head 2 --no-tied-head --qk-norm --window 20 "
    "--qkv-bias True --micro-batch-size 2 --n-layer 1"
)
MODELS = {
    "gpt2": [],
    "micro_batches": ["--micro-batch-size", 2],
    "llama": LLAMA.split(),
    "bfloat16": ["--precision", "bfloat16"],
    "dropout": ["--dropout", 0.2, "--embedding-dropout", 0.2],
    "muon": ["--optimizer", "muon"],
}
# Ranks, and options of the launch.
LAUNCHES = {
    "single": (0, []),
    "ddp": (2, []),
    "zero1": (2, ["--parallel", "zero1"]),
    "fsdp": (2, ["--parallel", "fsdp"]),
    "tensor": (2, ["--tensor-parallel", 2]),
    "hsdp": (4, ["--parallel", "fsdp", "--shard-ranks", 2]),
    "fsdp-tensor": (4, ["--parallel", "fsdp", "--tensor-parallel", 2]),
}


def losses(run) -> list[float]:
    rows = read_metrics(run)[0]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["loss"] for row in rows]


def assert_same(found, expected) -> None:
    """Each step sums in another order, which is one rounding per step."""
    np.testing.assert_allclose(found, expected, rtol=STEPS * np.finfo(np.float32).eps, atol=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs. All processes of pytest -n share it."""
    temporary = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    folder = (temporary.parent if is_worker else temporary) / "engines"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def only_process(file):
    """Let one process of pytest -n at a time into the context."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def words(home, monkeypatch) -> list:
    """Options of a run of two epochs, each of which ends with a padded window."""
    monkeypatch.setenv("TRITIUM_HOME", str(home))
    corpus = home / "corpus.txt"
    corpus.write_text("\n".join(str(number * number) for number in range(290)))
    options = {
        "data": corpus,
        "tokenizer": "bytes",
        "device": "cpu",
        "n-layer": 2,
        "n-head": 4,
        "d-model": 32,
        "context-tokens": 32,
        "steps": STEPS,
        "batch-size": 8,
        "warmup-steps": 2,
        "optimizer": "adamw",
        "lr": 3e-3,
        "min-lr": 1e-4,
        "eval-interval": 100,
        "checkpoint-interval": 5,
        "keep-checkpoints": 5,
        "sample-tokens": 2,
        "prompt": "1",
    }
    return ["laptop", *(word for name, value in options.items() for word in (f"--{name}", value))]


@pytest.fixture
def once(runs, words, launch):
    """Return the folder of a run of a model on an engine. Each is trained once."""

    def run(model: str, engine: str, *, compiled: bool = False):
        folder = runs / f"{model}-{engine}"
        ranks, options = LAUNCHES[engine]
        more = {}
        if compiled:
            options = [*options, "--compile", "on"]
            # Generates no code, which would take longer than the run.
            more["backend"] = "aot_eager"
        with only_process(folder.with_suffix(".lock")):
            if not folder.exists():
                status, _, err = launch(
                    ranks, *words, *MODELS[model], *options, "--out", folder, **more
                )
                assert status == [0] * len(status), err
        return folder

    return run


def assert_matches_single(run, single) -> None:
    assert_same(losses(run), losses(single))
    assert_same(
        *([row["grad_norm"] for row in read_metrics(folder)[0]] for folder in (run, single))
    )
    assert_same(*(read_metrics(folder)[1][-1]["val_loss"] for folder in (run, single)))
    assert (run / "samples.txt").read_text() == (single / "samples.txt").read_text()


@pytest.mark.parametrize("engine", [engine for engine in LAUNCHES if engine != "single"])
def test_a_run_matches_a_single_process(engine, once):
    assert_matches_single(once("gpt2", engine), once("gpt2", "single"))


OTHER_WEIGHTS = """
from tritium.model import gpt

original = gpt.init_weights

def init_weights(model, n_layer):
    original(model, n_layer)
    for parameter in model.parameters():
        parameter.data.add_(rank)

gpt.init_weights = init_weights
"""


def test_all_ranks_begin_with_the_weights_of_rank_0(words, launch, once, tmp_path):
    """Other versions of a library may draw other numbers."""
    status, _, err = launch(2, *words, "--out", tmp_path / "run", hook=OTHER_WEIGHTS)
    assert status == [0, 0], err
    assert_same(losses(tmp_path / "run"), losses(once("gpt2", "single")))


@pytest.mark.parametrize(
    "engine",
    ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "fsdp-tensor"))],
)
def test_micro_batches_options_and_compiled_code_match_a_single_process(engine, once):
    """Grouped heads, an untied head, QK-norm, a window and biases of queries, keys and values."""
    assert_matches_single(
        once("llama", engine, compiled=engine != "fsdp-tensor"), once("llama", "single")
    )


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("fsdp-tensor", marks=pytest.mark.slow)])
def test_micro_batches_of_a_model_with_biases_match_a_single_process(engine, once):
    """Each MLP's bias gets its gradient from a norm outside of the group that fully_shard made."""
    run = once("micro_batches", engine, compiled=engine == "fsdp")
    assert_matches_single(run, once("gpt2", "single"))


def test_tensor_ranks_drop_the_same_elements_of_branches_as_a_single_process(once):
    assert_matches_single(once("dropout", "tensor"), once("dropout", "single"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_ranks_compute_in_the_precision_of_the_run(engine, once):
    """The first loss matches to the rounding of float32, later ones to that of bfloat16."""
    exact, single, run = (
        losses(once(*pair))
        for pair in (("gpt2", "single"), ("bfloat16", "single"), ("bfloat16", engine))
    )
    assert_same(run[:1], single[:1])
    assert abs(run[0] - exact[0]) > 10 * abs(run[0] - single[0])
    np.testing.assert_allclose(run, single, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "hsdp", "zero1"])
def test_muon_matches_a_single_process_on_several_ranks(engine, once):
    assert_matches_single(once("muon", engine), once("muon", "single"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", "single"),
        ("fsdp-tensor", "ddp"),
        ("hsdp", "zero1"),
        ("zero1", "tensor"),
        ("tensor", "fsdp"),
        pytest.param("zero1", "fsdp-tensor", marks=pytest.mark.slow),
        pytest.param("tensor", "hsdp", marks=pytest.mark.slow),
    ],
)
def test_any_engine_resumes_a_run_of_any_other(before, after, once, launch, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(once("gpt2", before), broken)
    shutil.rmtree(broken / "checkpoints" / f"step-{STEPS}")
    ranks, options = LAUNCHES[after]
    status, _, err = launch(ranks, "--resume", broken, *options)
    assert status == [0] * len(status), err
    assert_same(losses(broken), losses(once("gpt2", "single")))
    for name in ("model", "optimizer"):
        found, expected = (
            load_file(run / "checkpoints" / f"step-{STEPS}" / f"{name}.safetensors")
            for run in (broken, once("gpt2", "single"))
        )
        assert {key: value.shape for key, value in found.items()} == {
            key: value.shape for key, value in expected.items()
        }
    assert found["wte.weight.step"] == STEPS
    changes = read_run(broken).history[0]["changes"]
    assert {"ranks", "parallel", "shard_ranks", "tensor_parallel"} & set(changes)


def test_weights_are_the_same_before_the_first_step(once):
    """Each engine writes the rows in the same order."""
    folders = [
        once("gpt2", engine) / "checkpoints" / "step-0" for engine in ("single", "tensor", "hsdp")
    ]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
