"""CUDA graphs of a step.

Without a GPU, a stand-in for the recorder calls the function at each replay. So everything but the
recording itself is tested: static arguments, gradients that stay, learning rates in tensors.
"""

import contextlib
import functools
import gc
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.choices import ENGINES
from tritium.train.config import TrainConfig
from tritium.train.data.loader import Batch
from tritium.train.distributed.engines import SingleProcess
from tritium.train.distributed.world import World
from tritium.train.execution import _uses_cuda_graph, resolve
from tritium.train.machine import cuda_graph
from tritium.train.optim import Optimizer
from tritium.train.trainer import Trainer

pytestmark = pytest.mark.plain

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SHAPE = GPTConfig(n_layer=2, n_head=2, d_model=64, vocab_size=20, context_tokens=8)
CPU = torch.device("cpu")


@pytest.fixture
def stand_in(monkeypatch):
    """Replace the recording of CUDA graphs by calls of the function. Counts recordings.

    As in a CUDA graph, the gradients of a first micro-batch are always in the same memory.
    """
    recordings = []

    def record(self):
        recordings.append(self)
        steps = self._function.__self__
        if self is not getattr(steps, "first", None):
            return functools.partial(replay, self)
        self._function(**self._static)
        kept = [parameter.grad for parameter in steps._parameters]
        return functools.partial(replay_first, self, steps._parameters, kept)

    def replay(self):
        self._result = self._function(**self._static)

    def replay_first(self, parameters, kept):
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        replay(self)
        for parameter, gradient, other in zip(parameters, kept, before, strict=True):
            gradient.copy_(parameter.grad)
            parameter.grad = other  # a replay runs no Python

    def warm_up(self):
        return self._function(**self._static)

    monkeypatch.setattr(cuda_graph.Recorded, "_record", record)
    monkeypatch.setattr(cuda_graph.Recorded, "_warm_up", warm_up)
    return recordings


def batches(count: int, rows: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(20, (count, rows, 9), generator=generator)
    # Padded rows: the micro-batches of a step have different weights.
    return [Batch(each, np.resize([8, 3, 8, 8], rows)) for each in windows]


def make_trainer(device: torch.device, *, records: bool, **options) -> Trainer:
    torch.manual_seed(0)
    options = {"batch_size": 4, "micro_batch_size": 2, "compile": "off"} | options
    config = TrainConfig.from_options(**options, device=device.type, cuda_graph="off")
    execution = replace(resolve(config), cuda_graph=records)
    shape = replace(SHAPE, dropout=config.model.dropout)
    engine = SingleProcess(GPT(shape).to(device), execution)
    return Trainer(engine, Optimizer(engine, config), seed=config.seed)


def train(trainer: Trainer, steps: list[Batch]) -> list[torch.Tensor]:
    """Train; return loss and gradient norm of each step, and at last the weights."""
    results = []
    for step, batch in enumerate(steps):
        loss = trainer.backward(batch, step=step)
        norm = trainer.update(1e-2 / (step + 1))
        results += [loss.clone(), norm.clone(), trainer.optimizer.skipped.clone()]
    return results + [parameter.detach().clone() for parameter in trainer.model.parameters()]


def check_equal_with_and_without_graph(device: torch.device, **options) -> Trainer:
    steps = batches(9)
    without = make_trainer(device, records=False, **options)
    with_graph = make_trainer(device, records=True, **options)
    expected = train(without, steps)
    found = train(with_graph, steps)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    return with_graph


OPTIONS = [
    {"optimizer": "adamw", "precision": "float32"},
    {"optimizer": "adamw", "precision": "bfloat16", "dropout": 0.1},
    {"optimizer": "adamw", "precision": "float16", "grad_clip": 0.1},
    {"optimizer": "muon"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_static_tensors_train_to_bitwise_the_same_weights(options, stand_in):
    check_equal_with_and_without_graph(CPU, **options)
    assert len(stand_in) == 3, "the first micro-batch, the others, and the update"


@needs_cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_graphs_train_to_bitwise_the_same_weights(options, compiled):
    trainer = check_equal_with_and_without_graph(torch.device("cuda"), compile=compiled, **options)
    assert trainer._recorded.first.is_recorded
    assert trainer._recorded.later.is_recorded
    assert trainer.optimizer._recorded.is_recorded


def test_both_graphs_of_a_micro_batch_are_recorded_on_one_stream(monkeypatch):
    """A pool of memory reuses nothing between streams."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: mock.Mock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    first = cuda_graph.Recorded(torch.neg, CPU)
    later = cuda_graph.Recorded(torch.neg, CPU, after=first)
    other = cuda_graph.Recorded(torch.neg, CPU)
    for recorded in (first, later, other):
        recorded(input=torch.ones(2))
    assert later._stream is first._stream is not other._stream


@needs_cuda
def test_the_graph_of_later_micro_batches_uses_the_memory_of_the_first():
    def reserved_bytes(micro_batches: int) -> int:
        gc.collect()  # a trainer with graphs is in a reference cycle
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        rows = 8192 * micro_batches
        sizes = {"batch_size": rows, "micro_batch_size": 8192}
        trainer = make_trainer(torch.device("cuda"), records=True, **sizes)
        train(trainer, batches(5, rows))
        assert trainer._recorded.later.is_recorded == (micro_batches > 1)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    one = reserved_bytes(1)
    assert one > 200e6
    assert reserved_bytes(3) < 1.3 * one


@needs_cuda
def test_a_replayed_step_never_waits_for_the_gpu():
    trainer = make_trainer(torch.device("cuda"), records=True)
    train(trainer, batches(6))
    assert trainer._recorded.later.is_recorded
    assert trainer.optimizer._recorded.is_recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches(2):
            trainer.backward(batch)
            trainer.update(1e-3)
        with pytest.raises(RuntimeError, match="synchroniz"):  # or nothing above was watched
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_keep_their_addresses(stand_in):
    trainer = make_trainer(CPU, records=True, precision="bfloat16")
    addresses = []
    for batch in batches(6):
        trainer.backward(batch)
        addresses.append([each.grad.data_ptr() for each in trainer.model.parameters()])
        trainer.update(1e-2)
    assert addresses[3] == addresses[4] == addresses[5]


def test_a_batch_of_another_size_is_not_recorded(stand_in):
    trainer = make_trainer(CPU, records=True)
    loss = trainer.backward(batches(1, rows=1)[0])
    assert torch.equal(loss, make_trainer(CPU, records=False).backward(batches(1, rows=1)[0]))
    assert trainer._recorded.first._num_calls == 0


def test_a_micro_batch_that_communicates_is_not_recorded(stand_in, monkeypatch):
    trainer = make_trainer(CPU, records=True)
    monkeypatch.setattr(SingleProcess, "can_record", False)
    loss = trainer.backward(batches(1)[0])
    assert torch.equal(loss, make_trainer(CPU, records=False).backward(batches(1)[0]))
    assert trainer._recorded.first._num_calls == 0


def test_a_restored_state_is_recorded_again(stand_in):
    trainer = make_trainer(CPU, records=True)
    train(trainer, batches(6))
    states = {
        parameter: {key: value.clone() for key, value in state.items()}
        for parameter, state in trainer.optimizer.states().items()
    }
    for parameter, state in states.items():
        trainer.optimizer.load_state(parameter, state)
    train(trainer, batches(6))
    assert [each._function.__name__ for each in stand_in].count("_change_weights") == 2


def test_the_first_micro_batch_is_recorded_before_the_others(stand_in):
    trainer = make_trainer(CPU, records=True, micro_batch_size=1)
    train(trainer, batches(4))
    assert stand_in[:2] == [trainer._recorded.first, trainer._recorded.later]


def test_gradients_in_other_memory_are_not_read_from_the_old_one(stand_in):
    trainer = make_trainer(CPU, records=True)
    train(trainer, batches(6))
    assert trainer.optimizer._recorded.is_recorded
    trainer.backward(batches(1)[0])
    for parameter in trainer.model.parameters():
        parameter.grad = parameter.grad.clone()
    trainer.update(1e-2)
    assert not trainer.optimizer._recorded.is_recorded


def test_a_skipped_step_changes_nothing_in_a_graph(stand_in):
    trainer = make_trainer(CPU, records=True)
    steps = batches(6)
    train(trainer, steps[:5])
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.backward(steps[5])
    trainer._loss = torch.tensor(torch.nan)
    trainer.update(1e-2)
    assert trainer.optimizer.skipped.item() == 1
    for parameter, kept in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)


@pytest.mark.parametrize(
    ("options", "engine", "device", "message"),
    [
        ({}, "single", "cpu", "the device is not an NVIDIA GPU"),
        ({"document_mask": True}, "single", "cuda", "the number of documents varies"),
        ({}, "fsdp", "cuda", "fsdp communicates in each micro-batch"),
    ],
)
def test_a_graph_that_cannot_be_recorded(options, engine, device, message, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    config = TrainConfig.from_options(**options)
    arguments = torch.device(device), ENGINES[engine].engine
    assert not _uses_cuda_graph(config, *arguments)
    with pytest.raises(InputError, match=f"cuda_graph: expected auto or off.*{message}"):
        _uses_cuda_graph(config.with_options(cuda_graph="on"), *arguments)


def test_graphs_are_used_on_cuda_unless_they_are_off(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    arguments = torch.device("cuda"), ENGINES["ddp"].engine
    assert _uses_cuda_graph(TrainConfig(), *arguments)
    assert not _uses_cuda_graph(TrainConfig.from_options(cuda_graph="off"), *arguments)


def test_ddp_does_not_record_the_micro_batch_that_communicates(monkeypatch):
    monkeypatch.setattr(World, "broadcast", lambda self, tensor: None)
    config = TrainConfig.from_options(batch_size=4, micro_batch_size=2)
    engine = ENGINES["ddp"].engine(GPT(SHAPE), resolve(config))
    recorded = []
    for is_last in (False, True):
        with contextlib.suppress(AttributeError):
            engine.begin_micro_step(is_last=is_last)
        recorded.append(engine.can_record)
    assert recorded == [True, False]
