"""Engines in one process that stands for two equal ranks: gradients, precisions, compiled code."""

from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
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

pytestmark = pytest.mark.plain

SHAPE = GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=20, context_tokens=8)
ROTARY = replace(SHAPE, position="rotary", norm="rms", tied_head=False)


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
    """They start in the last backward: the last block's, before the first block has gradients."""
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
