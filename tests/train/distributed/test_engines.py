"""Whatever ranks divide, and however many, a run is that of one process, to float32's rounding."""

import shutil
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tritium.model import GPT, GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.distributed.engines import micro_step, shard
from tritium.train.distributed.world import World
from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain

STEPS = 20
MODELS = {
    "gpt2": [],
    "llama": [
        "--position",
        "rotary",
        "--norm",
        "rms",
        "--mlp",
        "swiglu",
        "--n-kv-head",
        2,
        "--micro-batch-size",
        2,
    ],
    "bfloat16": ["--precision", "bfloat16"],
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


def losses(run) -> list[float]:
    rows = read_metrics(run)[0]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["loss"] for row in rows]


def assert_same(found, expected) -> None:
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

    def run(model: str, engine: str, *, compiled: bool = False):
        folder = runs / f"{model}-{engine}"
        if not folder.exists():
            ranks, options = ENGINES[engine]
            # By a backend without code generation, which takes longer than the run.
            compiling, backend = (
                (["--compile", "on"], {"backend": "aot_eager"}) if compiled else ([], {})
            )
            status, _, err = launch(
                ranks, *words, *MODELS[model], *options, *compiling, "--out", folder, **backend
            )
            assert status == [0] * len(status), err
        return folder

    return run


def assert_like_one_process(run, alone) -> None:
    assert_same(losses(run), losses(alone))
    assert_same(*([row["grad_norm"] for row in read_metrics(folder)[0]] for folder in (run, alone)))
    assert_same(*(read_metrics(folder)[1][-1]["val_loss"] for folder in (run, alone)))
    assert (run / "samples.txt").read_text() == (alone / "samples.txt").read_text()


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "alone"])
def test_a_run_is_that_of_one_process(engine, once):
    assert_like_one_process(once("gpt2", engine), once("gpt2", "alone"))


@pytest.mark.parametrize("engine", ["ddp", "hsdp", "fsdp-tensor"])
def test_micro_batches_grouped_heads_and_compiled_code_are_too(engine, once):
    assert_like_one_process(
        once("llama", engine, compiled=engine != "fsdp-tensor"), once("llama", "alone")
    )


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_ranks_compute_in_the_precision_of_the_run(engine, once):
    """Before the first update losses are alike to float32's rounding; then to bfloat16's, of gradients."""
    exact, alone, run = (
        losses(once(*pair))
        for pair in (("gpt2", "alone"), ("bfloat16", "alone"), ("bfloat16", engine))
    )
    assert_same(run[:1], alone[:1])
    assert abs(run[0] - exact[0]) > 10 * abs(run[0] - alone[0])
    np.testing.assert_allclose(run, alone, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", "alone"),
        ("fsdp-tensor", "ddp"),
        ("hsdp", "zero1"),
        ("zero1", "fsdp-tensor"),
        ("tensor", "hsdp"),
    ],
)
def test_any_ranks_resume_a_run_of_others(before, after, once, launch, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(once("gpt2", before), broken)
    shutil.rmtree(broken / "checkpoints" / "step-20")
    ranks, options = ENGINES[after]
    status, _, err = launch(ranks, "--resume", broken, *options)
    assert status == [0] * len(status), err
    assert_same(losses(broken), losses(once("gpt2", "alone")))
    for name in ("model", "optimizer"):
        found, expected = (
            load_file(run / "checkpoints" / "step-20" / f"{name}.safetensors")
            for run in (broken, once("gpt2", "alone"))
        )
        assert {key: value.shape for key, value in found.items()} == {
            key: value.shape for key, value in expected.items()
        }
    assert found["wte.weight.step"] == STEPS


def test_weights_are_the_same_before_the_first_step(once):
    """Whoever divides them: no row changes place."""
    folders = [
        once("gpt2", engine) / "checkpoints" / "step-0" for engine in ("alone", "tensor", "hsdp")
    ]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize("is_last", [False, True])
def test_gradients_travel_with_the_last_micro_batch_alone(is_last):
    """They are the same if they do with each, but slower."""
    network = MagicMock()
    micro_step(network, World(size=2, engine="fsdp"), is_last=is_last)
    network.set_requires_gradient_sync.assert_called_once_with(is_last)
    micro_step(network, World(size=2, engine="ddp"), is_last=is_last)
    assert network.no_sync.called is not is_last


def test_shards_compute_in_16_bits_sum_in_float32_and_are_compiled_by_parts(monkeypatch):
    policies, compiled = [], []
    monkeypatch.setattr(
        "torch.distributed.fsdp.fully_shard",
        lambda *_, mp_policy, **options: policies.append(mp_policy),
    )
    monkeypatch.setattr(
        torch, "compile", lambda forward, **_: compiled.append(forward.__self__) or forward
    )
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=20, context_tokens=8))
    shard(
        model,
        TrainConfig.from_options(precision="bfloat16"),
        MagicMock(engine="fsdp", tensor_ranks=1),
        compiled=True,
    )
    assert [policy.param_dtype for policy in policies] == [torch.bfloat16, None]
    assert {policy.reduce_dtype for policy in policies} == {torch.float32}
    assert compiled == [model.h[0].attn, model.h[0].mlp]
