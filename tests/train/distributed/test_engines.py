"""Runs on several ranks match the run of one process to the rounding of float32."""

import contextlib
import fcntl
import os
import shutil
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tritium.model import GPT, GPTConfig
from tritium.model.choices import RECOMPUTATIONS
from tritium.train.choices import ENGINES
from tritium.train.config import TrainConfig
from tritium.train.distributed import buckets
from tritium.train.distributed.engines import FSDP, SingleProcess
from tritium.train.distributed.world import World
from tritium.train.execution import resolve
from tritium.train.optim import Optimizer
from tritium.train.run.folder import read_run
from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain

STEPS = 10
SHAPE = GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=20, context_tokens=8)
ROTARY = replace(SHAPE, position="rotary", norm="rms", tied_head=False)
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


# --- gradients, in one process that stands for two equal ranks


@pytest.fixture
def reduced(monkeypatch) -> list[torch.Tensor]:
    """Collects tensors whose all-reduce starts. With an equal second rank a sum doubles."""
    tensors = []

    def all_reduce(tensor, async_op):
        assert async_op
        tensors.append(tensor)
        tensor *= 2
        return MagicMock()

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, src: None)
    return tensors


def engine_of(
    name: str,
    *,
    size: int = 2,
    recompute: str = "none",
    precision: str = "float32",
    shape: GPTConfig = SHAPE,
) -> SingleProcess:
    torch.manual_seed(0)
    world = World() if name == "single" else World(size=size, engine=name, is_distributed=True)
    execution = resolve(TrainConfig.from_options(precision=precision), world)
    return ENGINES[name].engine(GPT(shape, recompute=recompute), execution)


def backward(engine: SingleProcess, *, num_micro_batches: int = 3) -> torch.Tensor:
    """Add up the gradients of some micro-batches; return them in one tensor."""
    engine.begin_step()
    for index in range(num_micro_batches):
        engine.begin_micro_step(is_last=index == num_micro_batches - 1)
        tokens = torch.arange(16).view(2, 8) + index
        engine.network(tokens, tokens).backward()
    engine.finish_gradients()
    gradients = [parameter.grad for parameter in engine.model.parameters()]
    complete = [each.full_tensor() if isinstance(each, DTensor) else each for each in gradients]
    return torch.cat([gradient.flatten() for gradient in complete])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_of_equal_ranks_match_one_process(precision, reduced):
    single = engine_of("single", precision=precision)
    ddp = engine_of("ddp", precision=precision)
    for _ in range(2):
        assert torch.equal(backward(ddp), backward(single))
        for engine in (ddp, single):
            engine.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_are_reduced_once_per_step_and_in_float32(precision, reduced):
    engine = engine_of("ddp", precision=precision)
    gradients = backward(engine)
    assert sum(tensor.numel() for tensor in reduced) == gradients.numel()
    assert {tensor.dtype for tensor in reduced} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_are_reduced_during_the_last_backward(precision, reduced, monkeypatch):
    """Not before it, and those of the last block before the first block has its gradients."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 1)  # one bucket per parameter
    engine = engine_of("ddp", precision=precision)
    num_started = []
    weight = engine.working.h[0].attn.c_attn.weight
    weight.register_post_accumulate_grad_hook(lambda _: num_started.append(len(reduced)))
    backward(engine, num_micro_batches=2)
    in_last_block = len(list(engine.model.h[1].parameters()))
    assert num_started[0] == 0
    assert in_last_block <= num_started[1] < len(reduced)


@pytest.fixture
def one_rank():
    """A process group of one rank, in which fully_shard frees and gathers weights all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "recompute"),
    [*((SHAPE, mode) for mode in RECOMPUTATIONS), (ROTARY, "block")],
    ids=[*RECOMPUTATIONS, "rotary_untied"],
)
def test_gradients_of_fsdp_match_one_process(shape, recompute, precision, one_rank):
    """Over several micro-batches and steps. No hook stays on a gathered parameter."""
    options = {"shape": shape, "recompute": recompute, "precision": precision}
    engines = [engine_of("fsdp", size=1, **options), engine_of("single", **options)]
    for _ in range(2):
        assert torch.equal(*map(backward, engines))
        for engine in engines:
            engine.model.zero_grad(set_to_none=True)
    gathered = []
    for block in engines[0].model.h:
        block.mlp.register_forward_pre_hook(lambda mlp, _: gathered.extend(mlp.parameters()))
    backward(engines[0])
    assert gathered
    assert not any(parameter._backward_hooks for parameter in gathered)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "hsdp", "zero1"])
def test_muon_matches_a_single_process_on_several_ranks(engine, once):
    assert_matches_single(once("muon", engine), once("muon", "single"))


def test_muon_under_fsdp_matches_one_process(one_rank):
    weights = []
    for name in ("fsdp", "single"):
        engine = engine_of(name, size=1)
        optimizer = Optimizer(engine, TrainConfig.from_options(optimizer="muon"))
        for _ in range(2):
            backward(engine)
            optimizer.update(0.01)
        weights.append(engine.gather_weights())
        states = engine.gather_optimizer_states(optimizer)
        assert {key for state in states.values() for key in state} >= {"momentum_buffer"}
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_fsdp_reduces_gradients_with_the_last_micro_batch_only():
    engine = MagicMock(spec=FSDP, world=MagicMock(), model=MagicMock())
    for is_last in (False, True):
        FSDP.begin_micro_step(engine, is_last=is_last)
        engine.model.set_requires_gradient_sync.assert_called_with(is_last)


def test_fsdp_computes_in_16_bits_sums_in_float32_and_compiles_layers(monkeypatch):
    policies, compiled = [], []
    monkeypatch.setattr(
        "torch.distributed.fsdp.fully_shard",
        lambda *_, mp_policy, **options: policies.append(mp_policy),
    )
    monkeypatch.setattr(
        torch, "compile", lambda forward, **_: compiled.append(forward.__self__) or forward
    )
    model = GPT(SHAPE)
    execution = replace(
        resolve(TrainConfig.from_options(precision="bfloat16", compile="on")),
        world=MagicMock(data_ranks=2, shard_ranks=2, tensor_ranks=1),
    )
    engine = FSDP(model, execution)
    assert engine.network is engine.working is model
    assert model.compute_dtype == torch.bfloat16
    assert [policy.param_dtype for policy in policies] == [torch.bfloat16] * 2 + [None]
    assert {policy.reduce_dtype for policy in policies} == {torch.float32}
    assert compiled == [layer for block in model.h for layer in (block.attn, block.mlp)]


@pytest.mark.parametrize("name", ["single", "ddp"])
def test_samples_are_computed_in_the_precision_of_the_run(name, reduced):
    model = engine_of(name, precision="bfloat16").complete_model()
    assert model.h[0].attn.c_attn.weight.dtype == torch.bfloat16
