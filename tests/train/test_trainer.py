import functools
import gc
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.model import GPT, GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.data.loader import Batch
from tritium.train.distributed.engines import SingleProcess
from tritium.train.distributed.world import World
from tritium.train.evaluate import evaluate
from tritium.train.execution import resolve
from tritium.train.optim import Optimizer
from tritium.train.optimizer.bad_steps import OVERFLOWED
from tritium.train.precision import linear_parameters, refresh, working_copy
from tritium.train.trainer import Trainer, quiet_collector, single_trainer

pytestmark = pytest.mark.plain

SHAPE = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=20, context_tokens=8)


def make(**options) -> Trainer:
    torch.manual_seed(0)
    config = TrainConfig.from_options(**{"batch_size": 6} | options)
    model = GPT(SHAPE)
    return single_trainer(model, config)


def batch(rows: int = 6) -> Batch:
    windows = torch.randint(20, (rows, 9), generator=torch.Generator().manual_seed(1))
    return Batch(windows, np.full(rows, 8))


def step_losses(trainer: Trainer, batches) -> list[float]:
    """Take a step with each batch; return the losses."""
    losses = []
    for each in batches:
        losses.append(trainer.backward(each).item())
        trainer.update(3e-3)
    return losses


def gradients(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def test_micro_batches_add_up_to_the_batch():
    # Padded rows: the micro-batches have different numbers of targets.
    padded = Batch(batch().windows, np.array([8, 2, 8, 8, 0, 8]))
    results = []
    for micro_batch in (6, 2, 1):
        trainer = make(micro_batch_size=micro_batch)
        trainer.model.double()
        results.append((trainer.backward(padded), gradients(trainer)))
    for loss, found in results[1:]:
        torch.testing.assert_close(found, results[0][1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)


def test_dropout_differs_between_micro_batches_ranks_and_steps(monkeypatch):
    seeds = []
    trainer = single_trainer(GPT(replace(SHAPE, dropout=0.1)), TrainConfig())
    monkeypatch.setattr(
        "tritium.train.trainer.batch_loss",
        lambda model, part, seed: seeds.append(seed) or model.wte.weight.sum(),
    )
    for rank in (0, 1):
        world = World(rank=rank, size=2)
        execution = replace(trainer.engine.execution, micro_batch=3, world=world)
        monkeypatch.setattr(trainer.engine, "execution", execution)
        monkeypatch.setattr(world, "mean", lambda total: total)
        for step in (0, 1, 0):
            trainer.backward(batch(), step=step)
    first, second = seeds[:6], seeds[6:]
    for found in (first, second):
        assert found[:2] == found[4:], "a repeated step drops the same"
    assert len({*first[:4], *second[:4]}) == 8


def test_the_seed_of_the_run_chooses_what_is_dropped(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "tritium.train.trainer.batch_loss",
        lambda model, part, seed: seeds.append(seed) or model.wte.weight.sum(),
    )
    for seed in (1, 1, 2):
        config = TrainConfig(seed=seed)
        single_trainer(GPT(replace(SHAPE, dropout=0.1)), config).backward(batch(), step=0)
    assert seeds[0] == seeds[1] != seeds[2]


def test_evaluations_drop_nothing_and_training_goes_on_with_dropout():
    trainer = single_trainer(GPT(replace(SHAPE, dropout=0.5)), TrainConfig())
    losses = [evaluate(trainer.working, [batch()], bytes_per_token=1.0).loss for _ in range(2)]
    assert losses[0] == losses[1]
    assert trainer.working.training
    assert trainer.backward(batch(), step=0).item() != trainer.backward(batch(), step=1).item()


def test_the_engine_is_told_which_micro_batch_is_the_last(monkeypatch):
    calls = []
    trainer = make(micro_batch_size=2)
    monkeypatch.setattr(trainer.engine, "begin_step", lambda: calls.append("step"))
    monkeypatch.setattr(
        trainer.engine, "begin_micro_step", lambda *, is_last: calls.append(is_last)
    )
    monkeypatch.setattr(trainer.engine, "finish_gradients", lambda: calls.append("finish"))
    trainer.backward(batch())
    assert calls == ["step", False, False, True, "finish"]


def test_four_micro_batches_match_one_batch_to_rounding_in_bfloat16():
    exact, whole, parts = (
        make(precision=precision, batch_size=32, micro_batch_size=size)
        for precision, size in (("float32", 32), ("bfloat16", 32), ("bfloat16", 8))
    )
    losses = [trainer.backward(batch(32)).item() for trainer in (exact, whole, parts)]
    truth, once, four_times = map(gradients, (exact, whole, parts))
    # Four 16-bit gradients, added in float32, are as close to the float32 gradient as one.
    assert 0 < (four_times - truth).norm() <= 1.1 * (once - truth).norm()
    assert (once - truth).norm() <= 4 * torch.finfo(torch.bfloat16).eps * truth.norm()
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_short_training_in_16_bits_matches_float32(precision):
    exact, narrow = make(), make(precision=precision)
    losses = [[], []]
    for _ in range(30):
        for trainer, found in zip((exact, narrow), losses, strict=True):
            found.append(trainer.backward(batch()).item())
            trainer.update(3e-3)
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    states = [value for state in narrow.optimizer.states().values() for value in state.values()]
    assert {value.dtype for value in (*narrow.model.parameters(), *states)} == {torch.float32}
    # The masters keep changes that the 16-bit dtype cannot represent. The copy follows them.
    weight, dtype = narrow.model.h[0].attn.c_attn.weight, getattr(torch, precision)
    assert not torch.equal(weight, weight.to(dtype).float())
    assert torch.equal(narrow.working.h[0].attn.c_attn.weight, weight.to(dtype))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["wte.weight", "h.0.mlp.c_fc.weight"])
def test_a_step_that_overflows_in_float16_is_skipped_and_halves_the_scale(optimizer, name):
    """All parameters keep their values, whichever of PyTorch's optimizers has the overflow."""
    trainer = make(precision="float16", optimizer=optimizer)
    trainer.backward(batch())
    trainer.update(1e-3)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    scale = trainer.optimizer.scaler.state_dict()["scale"]
    trainer.backward(batch())
    trainer.model.get_parameter(name).grad[0, 0] = torch.inf
    assert not trainer.update(1e-3).isfinite()
    assert trainer.optimizer.skipped == OVERFLOWED, "it is not bad"
    assert trainer.optimizer.scaler.state_dict()["scale"] == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.backward(batch())
    assert trainer.update(1e-3).isfinite()
    assert not torch.equal(before[0], next(trainer.model.parameters()))


def test_the_gradient_norm_in_float16_is_unscaled():
    norms = []
    for precision in ("float32", "float16"):
        trainer = make(precision=precision)
        trainer.backward(batch())
        norms.append(trainer.update(1e-3).item())
    assert norms[0] == pytest.approx(norms[1], rel=4 * torch.finfo(torch.float16).eps)


@pytest.fixture
def graphs(monkeypatch) -> CompileCounterWithBackend:
    """Counts compilations, with a backend that generates no code."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_training_compiles_one_graph_and_evaluations_and_samples_none(precision, graphs):
    plain, compiled = (
        make(micro_batch_size=2, precision=precision, compile=option) for option in ("off", "on")
    )
    batches = [batch()] * 3
    results = []
    for trainer in (plain, compiled):
        losses = step_losses(trainer, batches)
        found = evaluate(trainer.working, [batch(), batch(3)], bytes_per_token=1.0).loss
        sampled = trainer.working.generate(batch().inputs[:1, :2], 3, temperature=0)
        losses += step_losses(trainer, batches)
        results.append(([*losses, found], sampled))
    assert graphs.frame_count == 1
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.equal(results[0][1], results[1][1])
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()


@pytest.mark.slow
def test_a_second_batch_size_is_compiled_once_for_all_sizes(graphs):
    trainer = make(compile="on")
    step_losses(trainer, [batch(rows) for rows in (6, 5, 4, 3, 2)])
    assert graphs.frame_count == 2


def test_any_number_of_documents_uses_one_graph(graphs):
    trainer = make(compile="on")
    for documents in (1, 2, 5, 9, 17, 30):
        windows = torch.ones(6, 9, dtype=torch.int64)
        windows.view(-1)[torch.randperm(54)[:documents]] = 0
        trainer.backward(Batch(windows, np.full(6, 8), separator=0))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("rows", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_one_document_per_micro_batch_and_many_use_one_graph(rows, graphs):
    """One row with one document: the shortest cu_seqlens."""
    trainer = make(compile="on", batch_size=rows)
    for documents in (0, 1, 3, 7):
        windows = torch.ones(rows, 9, dtype=torch.int64)
        windows[0, 1 : 1 + documents] = 0
        trainer.backward(Batch(windows, np.full(rows, 8), separator=0))
    assert graphs.frame_count == 1


def test_training_compiled_by_inductor_matches_eager():
    torch._dynamo.reset()
    plain, compiled = (make(micro_batch_size=2, compile=option) for option in ("off", "on"))
    assert step_losses(plain, [batch()] * 3) == pytest.approx(
        step_losses(compiled, [batch()] * 3), rel=1e-6
    )
    for mine, other in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("separator", [None, 0])
def test_a_step_reads_nothing_from_its_device(separator, optimizer, monkeypatch):
    """On the meta device int, bool, tolist, nonzero and copies to the CPU all raise."""
    optimizers = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    # PyTorch has no _fused_sgd_ for the meta device.
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **options: options["found_inf"])
    config = TrainConfig.from_options(batch_size=6, micro_batch_size=2, optimizer=optimizer)
    execution = replace(resolve(config), device=torch.device("meta"), cuda_graph=False)
    engine = SingleProcess(GPT(SHAPE).to("meta"), execution)
    trainer = Trainer(engine, Optimizer(engine, config))
    for _ in range(2):
        loss = trainer.backward(replace(batch(), separator=separator))
        norm = trainer.update(1e-3)
    assert loss.device == norm.device == torch.device("meta")
    for read in (float, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(loss)


def test_casting_weights_and_summing_gradients_read_nothing_from_the_device():
    model = GPT(SHAPE).to("meta")
    copy = working_copy(model, torch.bfloat16)
    for _ in range(2):
        sum(weight.float().sum() for weight in linear_parameters(copy)).backward()
    refresh(copy, model)
    assert all(weight.grad.dtype == torch.float32 for weight in linear_parameters(model))


def test_scaling_losses_reads_nothing_from_the_device():
    """No tensor becomes a Python number during an update."""

    class Unread(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
            )
            return func(*args, **kwargs or {})

    trainer = make(precision="float16")
    trainer.backward(batch())
    with Unread():
        trainer.update(1e-3)
    with pytest.raises(AssertionError), Unread():
        float(torch.ones(()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_never_waits_for_the_gpu(precision):
    config = TrainConfig.from_options(
        batch_size=8, micro_batch_size=4, precision=precision, compile="off"
    )
    # So many tokens that PyTorch sorts them for the embedding's gradient.
    model = GPT(replace(SHAPE, context_tokens=1024)).cuda()
    trainer = single_trainer(model, config)
    # The last window of the data is padded.
    padded = Batch(torch.randint(20, (8, 1025)), np.array([1024] * 7 + [5]), separator=0)
    step_losses(trainer, [padded] * 2)  # compiles kernels, allocates the optimizer state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trainer.backward(padded)
            trainer.update(1e-3)
        with pytest.raises(RuntimeError, match="synchroniz"):  # or nothing above was watched
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_leave_no_tensors_to_the_garbage_collector():
    trainer = make(micro_batch_size=2, precision="bfloat16")
    step_losses(trainer, [batch()] * 2)
    with quiet_collector():
        assert not gc.isenabled()
        step_losses(trainer, [batch()] * 3)
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_trainer_is_freed_without_the_collector():
    """Its tensors would otherwise stay allocated until Python's collector happens to run."""
    gc.collect()
    gc.disable()
    try:
        trainer = make()
        step_losses(trainer, [batch()])
        freed = weakref.ref(trainer.model.wte.weight)
        del trainer
        assert freed() is None
    finally:
        gc.enable()
