"""Checkpoints in the background. test_checkpoint.py tests their content."""

import shutil
import threading
import time

import numpy as np
import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.config import ReportOptions, TrainConfig
from tritium.train.data.loader import Batch
from tritium.train.distributed.engines import SingleProcess
from tritium.train.execution import resolve
from tritium.train.optim import Optimizer
from tritium.train.recipes import recipe
from tritium.train.run import saver as saver_module
from tritium.train.run.checkpoint import CheckpointError, checkpoints, load_newest
from tritium.train.run.saver import (
    CheckpointSaver,
    HostBuffer,
    check_space_for_run,
    checkpoint_bytes,
)
from tritium.train.trainer import Trainer

pytestmark = pytest.mark.plain

SHAPE = GPTConfig(n_layer=2, n_head=2, d_model=64, vocab_size=200, context_tokens=8)
REPORT = ReportOptions(keep_checkpoints=2)


def trained(config: TrainConfig = TrainConfig()) -> tuple[SingleProcess, Optimizer]:  # noqa: B008
    """A model and its optimizer after a step, on the GPU if there is one."""
    torch.manual_seed(0)
    execution = resolve(config)
    engine = SingleProcess(GPT(SHAPE).to(execution.device), execution)
    optimizer = Optimizer(engine, config)
    take_step(engine, optimizer)
    return engine, optimizer


def take_step(engine: SingleProcess, optimizer: Optimizer) -> None:
    tokens = torch.randint(200, (2, 8)).to(engine.execution.device)
    engine.model(tokens, tokens).backward()
    optimizer.update(1e-2)


@pytest.fixture
def writing(monkeypatch) -> threading.Event:
    """Writes wait for this event."""
    allowed = threading.Event()
    write = saver_module.write_checkpoint

    def late(*arguments, **options):
        assert allowed.wait(30)
        write(*arguments, **options)

    monkeypatch.setattr(saver_module, "write_checkpoint", late)
    return allowed


def test_steps_during_a_write_do_not_change_the_checkpoint(tmp_path, writing):
    engine, optimizer = trained()
    weights = {name: value.clone() for name, value in engine.model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in optimizer.states().values()]
    with CheckpointSaver(tmp_path, engine, optimizer, REPORT) as saver:
        saver.save(1)
        assert saver.last_step == 1
        generator = torch.get_rng_state()
        take_step(engine, optimizer)
        assert checkpoints(tmp_path) == {}
        writing.set()
    assert load_newest(tmp_path, engine, optimizer) == 1
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in engine.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for state, moment in zip(optimizer.states().values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment)


def test_a_save_waits_for_the_one_before_and_uses_its_buffer_again(tmp_path, writing):
    engine, optimizer = trained()
    saver = CheckpointSaver(tmp_path, engine, optimizer, REPORT)
    saver.save(1)
    threading.Timer(0.2, writing.set).start()
    saver.save(2)
    assert 1 in checkpoints(tmp_path)
    assert saver.stall_seconds > 0.1
    saver.wait()
    assert list(checkpoints(tmp_path)) == [1, 2]
    state = [value for state in optimizer.states().values() for value in state.values()]
    nbytes = sum(value.nbytes for value in [*engine.model.parameters(), *state])
    assert saver._buffer.nbytes == nbytes


def test_an_error_of_the_thread_is_raised_by_the_next_save(tmp_path, writing):
    """It says which checkpoint and file were not written. The run can save again."""
    engine, optimizer = trained()
    saver = CheckpointSaver(tmp_path, engine, optimizer, REPORT)
    saver.save(1)
    (tmp_path / "checkpoints").touch()
    writing.set()
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint after step 1 was not written: .*/step-1: Not a directory",
    ):
        saver.save(2)
    (tmp_path / "checkpoints").unlink()
    saver.save(3)
    saver.wait()
    assert list(checkpoints(tmp_path)) == [3]


def test_the_last_checkpoint_is_written_after_another_error(tmp_path, capsys):
    engine, optimizer = trained()
    saver = CheckpointSaver(tmp_path, engine, optimizer, REPORT)
    saver.save(1)
    error = ZeroDivisionError()
    saver.__exit__(type(error), error, None)
    assert list(checkpoints(tmp_path)) == [1]
    assert capsys.readouterr().err == ""


def test_a_removed_run_folder_is_not_made_again(tmp_path):
    engine, optimizer = trained()
    run = tmp_path / "run"
    run.mkdir()
    saver = CheckpointSaver(run, engine, optimizer, REPORT)
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError, match="run"):
        saver.save(1)
    assert not run.exists()


@pytest.mark.parametrize("block_bytes", [16, 1 << 20])
def test_a_buffer_returns_the_bytes_of_tensors(block_bytes):
    buffer = HostBuffer(pinned=False, block_bytes=block_bytes)
    tensors = [torch.randn(3, 5).t(), torch.tensor(2.0), torch.randn(0), torch.randn(7)]
    expected = b"".join(each.contiguous().numpy().tobytes() for each in tensors)
    for _ in range(2):
        buffer.resize(2 * len(expected))
        first = buffer.append(tensors)
        second = buffer.append(tensors)
        assert b"".join(first) == b"".join(second) == expected
    assert buffer.nbytes == 2 * len(expected)


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(optimizer_name, tmp_path):
    config = TrainConfig(optimizer=optimizer_name)
    engine, optimizer = trained(config)
    saver = CheckpointSaver(tmp_path, engine, optimizer, REPORT)
    saver.save(1, background=False)
    written = sum(file.stat().st_size for file in checkpoints(tmp_path)[1].iterdir())
    assert checkpoint_bytes(config, engine) == pytest.approx(written, rel=0.15)
    tensors = sum(
        value.nbytes
        for value in [
            *engine.model.parameters(),
            *(each for state in optimizer.states().values() for each in state.values()),
        ]
    )
    assert checkpoint_bytes(config, engine) == pytest.approx(tensors, rel=0.01)


def test_a_disk_that_is_too_small_is_one_line_before_the_first_step(tmp_path, monkeypatch):
    engine, optimizer = trained()
    config = TrainConfig.from_options(
        steps=1000, checkpoint_interval=10, keep_checkpoints=2, keep_every=100
    )
    one = checkpoint_bytes(config, engine)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=13 * one - 1))
    with pytest.raises(InputError, match=r"GB of free disk space for 13 checkpoints of .*, got"):
        check_space_for_run(tmp_path, config, engine)
    # Checkpoints that are written already need no more space.
    saver = CheckpointSaver(tmp_path, engine, optimizer, REPORT)
    saver.save(1, background=False)
    check_space_for_run(tmp_path, config, engine)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(InputError, match="disk space for the checkpoint after step 2, got"):
        saver.save(2)
    assert list(checkpoints(tmp_path)) == [1]


@pytest.mark.slow
def test_a_save_every_200_steps_costs_at_most_one_percent(tmp_path, capsys):
    """The default model on a CPU, with a quarter of its batch: steps are short.

    Blocks of steps with and without a save follow each other.
    """
    config = recipe("laptop").with_options(device="cpu", batch_size=4)
    T, B = config.model.context_tokens, config.batch_size
    torch.manual_seed(0)
    engine = SingleProcess(GPT(config.gpt(4096)), resolve(config))
    optimizer = Optimizer(engine, config)
    trainer = Trainer(engine, optimizer)
    batch = Batch(torch.randint(4096, (B, T + 1)), np.full(B, T))
    saver = CheckpointSaver(tmp_path, engine, optimizer, REPORT)

    def block(number: int, *, has_save: bool) -> np.ndarray:
        """Returns: seconds, CPU seconds of all threads, and stall of 10 steps and a save."""
        clocks = time.perf_counter, time.process_time, lambda: saver.stall_seconds
        began = np.array([clock() for clock in clocks])
        if has_save:
            saver.save(number)
        for _ in range(10):
            trainer.backward(batch)
            trainer.update(1e-3)
        saver.wait()
        return np.array([clock() for clock in clocks]) - began

    block(0, has_save=True)  # the first save allocates the buffer
    rows = [[block(number, has_save=has_save) for has_save in (False, True)] for number in range(7)]
    without, with_save = np.array(rows).transpose(1, 0, 2)
    cost = np.median(with_save - without, axis=0) / np.median(20 * without[:, :1], axis=0)
    nbytes = checkpoint_bytes(config, engine)
    with capsys.disabled():
        print(
            f"\n{nbytes / 1e6:.0f} MB per checkpoint, {np.median(without[:, 0]) / 10:.3f} s per "
            f"step; of 200 steps: wall {cost[0]:.2%}, CPU {cost[1]:.2%}, stall {cost[2]:.2%}; "
            f"buffer {saver._buffer.nbytes / nbytes:.3f} x model and optimizer"
        )
    assert cost[1] <= 0.01  # wall time also has the noise of other processes
    assert cost[2] <= 0.01
    assert saver._buffer.nbytes <= 1.1 * nbytes
