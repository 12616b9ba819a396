import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.config import ReportOptions, TrainConfig
from tritium.train.distributed.engines import SingleProcess
from tritium.train.execution import resolve
from tritium.train.optim import Optimizer
from tritium.train.run import checkpoint
from tritium.train.run.checkpoint import (
    CheckpointError,
    load_newest,
    load_weights,
    newest_checkpoint,
)
from tritium.train.run.saver import CheckpointSaver
from tritium.train.storage.files import seal, unseal

pytestmark = pytest.mark.plain

CONFIG = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=20, context_tokens=8)


def trained(seed: int, steps: int, **options) -> tuple[SingleProcess, Optimizer]:
    torch.manual_seed(seed)
    config = TrainConfig.from_options(**options)
    engine = SingleProcess(GPT(CONFIG), resolve(config))
    optimizer = Optimizer(engine, config)
    for _ in range(steps):
        tokens = torch.randint(20, (2, 8))
        optimizer.scaler.scale(engine.model(tokens, tokens)).backward()
        optimizer.update(1e-3)
    return engine, optimizer


def save(run, step, engine, optimizer, **report) -> Path:
    """Write a checkpoint and wait for it."""
    report = ReportOptions(**report)
    with CheckpointSaver(run, engine, optimizer, report) as saver:
        saver.save(step, background=False)
    return run / "checkpoints" / f"step-{step}"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"precision": "float16"}], ids=str)
def test_round_trip_is_bitwise(options, run):
    engine, optimizer = trained(0, 3, **options)
    save(run, 3, engine, optimizer, keep_checkpoints=2)
    generator = torch.get_rng_state()
    other, other_optimizer = trained(1, 1, **options)
    other_optimizer.scaler.load_state_dict({"scale": 8.0, "_growth_tracker": 1})
    assert load_newest(run, other, other_optimizer) == 3
    assert torch.equal(torch.get_rng_state(), generator)
    for a, b in zip(engine.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        state, other_state = optimizer.states()[a], other_optimizer.states()[b]
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert torch.equal(value, other_state[key]), key
    assert optimizer.scaler.state_dict() == other_optimizer.scaler.state_dict()


def test_weights_can_be_loaded_alone(run):
    engine, optimizer = trained(0, 1)
    folder = save(run, 1, engine, optimizer, keep_checkpoints=1)
    model = GPT(CONFIG)
    assert load_weights(folder, model) == 1
    for a, b in zip(engine.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_checkpoints_are_kept(run):
    engine, optimizer = trained(0, 1)
    for step in (2, 9, 10, 100):
        save(run, step, engine, optimizer, keep_checkpoints=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-100"]
    assert newest_checkpoint(run).name == "step-100"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_files_raise(run, name, damage):
    engine, optimizer = trained(0, 1)
    folder = save(run, 1, engine, optimizer, keep_checkpoints=1)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 4
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(InputError, match=rf"{name}: (damaged: expected SHA-256|cannot be read)"):
        load_newest(run, engine, optimizer)


def test_checkpoints_of_other_models_and_steps_raise(run):
    engine, optimizer = trained(0, 1)
    folder = save(run, 1, engine, optimizer, keep_checkpoints=1)
    wider = GPT(GPTConfig(n_layer=1, n_head=2, d_model=32, vocab_size=20, context_tokens=8))
    with pytest.raises(
        InputError, match=r"expected h.0.attn.c_attn.bias of shape \(96,\), got \(48,\)"
    ):
        load_weights(folder, wider)
    folder.rename(folder.with_name("step-2"))
    with pytest.raises(
        InputError, match="expected the checkpoint of the step in its name, got step 1"
    ):
        load_newest(run, engine, optimizer)
    with pytest.raises(InputError, match="expected a checkpoint in it, found none"):
        newest_checkpoint(run / "sub")


def test_a_flipped_bit_in_the_state_raises(run):
    engine, optimizer = trained(0, 1)
    file = save(run, 1, engine, optimizer, keep_checkpoints=1) / "state.json"
    content = file.read_bytes()
    for place in range(0, len(content), 97):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if content[place : place + 1].isspace():
            continue  # white space in JSON has no meaning
        with pytest.raises(InputError, match=r"state\.json: damaged"):
            load_newest(run, engine, optimizer)


def test_files_of_a_killed_process_are_deleted(run):
    engine, optimizer = trained(0, 1)
    (run / "checkpoints" / ".step-1.tmp").mkdir(parents=True)
    (run / "checkpoints" / ".step-1.tmp" / "model.safetensors").write_bytes(b"half")
    save(run, 5, engine, optimizer, keep_checkpoints=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-5"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_failed_write_names_the_file_and_leaves_no_files(name, run, monkeypatch):
    engine, optimizer = trained(0, 1)
    save(run, 1, engine, optimizer, keep_checkpoints=1)
    write = checkpoint.write_flushed

    def full(path, pieces):
        if path.name == name:
            raise OSError(28, "No space left on device", str(path))
        write(path, pieces)

    monkeypatch.setattr(checkpoint, "write_flushed", full)
    with pytest.raises(CheckpointError, match=f"after step 2 was not .*/step-2/{name}: No space"):
        save(run, 2, engine, optimizer, keep_checkpoints=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]


def test_the_state_names_step_and_files(run):
    engine, optimizer = trained(0, 1)
    state = json.loads(
        (save(run, 7, engine, optimizer, keep_checkpoints=1) / "state.json").read_text()
    )
    assert state["step"] == 7
    assert set(state["files"]) == {"model.safetensors", "optimizer.safetensors"}


def test_multiples_of_keep_every_are_kept(run):
    engine, optimizer = trained(0, 1)
    report = {"keep_checkpoints": 2, "keep_every": 20, "checkpoint_interval": 10}
    for step in range(0, 71, 10):
        save(run, step, engine, optimizer, **report)
    assert list(checkpoint.checkpoints(run)) == [20, 40, 60, 70]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_loaded(run, capsys):
    engine, optimizer = trained(0, 1)
    for step in (1, 2, 3):
        folder = save(run, step, engine, optimizer, keep_checkpoints=5)
    (folder / "optimizer.safetensors").write_bytes(b"")
    assert load_newest(run, engine, optimizer) == 2
    assert re.fullmatch(
        r"tritium: .*step-3/optimizer.safetensors: damaged: .*; resuming from step-2 instead\n",
        capsys.readouterr().err,
    )
    # The damaged one does not count as one of the newest, and is replaced.
    save(run, 2, engine, optimizer, keep_checkpoints=1)
    assert list(checkpoint.checkpoints(run)) == [2, 3]
    save(run, 3, engine, optimizer, keep_checkpoints=1)
    assert load_newest(run, engine, optimizer) == 3
    assert list(checkpoint.checkpoints(run)) == [3]
    (folder / "state.json").unlink()
    with pytest.raises(InputError, match=r"step-3/state.json: damaged: .* the run cannot be resu"):
        load_newest(run, engine, optimizer)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", None, "step: expected a number of steps, got None"),
        ("step", "1", "step: expected a number of steps, got '1'"),
        ("step", True, "step: expected a number of steps, got True"),
        ("format_version", 9, "format_version: expected 1, got 9"),
        ("torch_rng", "00", "torch_rng: expected [0-9]+ bytes in hexadecimal, got '00'"),
        ("torch_rng", 5, "torch_rng: expected"),
        ("loss_scale", {"scale": 1.0}, "loss_scale: expected the state of a GradScaler or {}, got"),
        ("files", [], r"files: expected a SHA-256 for each file, got \[\]"),
        ("files", {}, "files: model.safetensors: expected a SHA-256, got None"),
    ],
)
def test_a_sealed_state_with_wrong_keys_is_named(key, value, message, run):
    engine, optimizer = trained(0, 1)
    file = save(run, 1, engine, optimizer) / "state.json"
    state = unseal(file.read_bytes()) | {key: value}
    if value is None:
        del state[key]
    file.write_bytes(seal(state))
    with pytest.raises(InputError, match=rf"state\.json: {message}"):
        load_newest(run, engine, optimizer)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("model", {"wte.weight": torch.zeros(20, 16, dtype=torch.int8)}, "expected float32, got"),
        ("optimizer", {"wte.weight.exp_avg": torch.zeros(3)}, r"of shape \(64, 16\), got \(3,\)"),
        ("optimizer", {"x": torch.zeros(3)}, r"expected x of shape None, got \(3,\)"),
    ],
)
def test_sealed_tensors_of_another_type_or_shape_raise(name, tensors, message, run):
    engine, optimizer = trained(0, 1)
    folder = save(run, 1, engine, optimizer)
    file = folder / f"{name}.safetensors"
    save_file(load_file(file) | tensors, file)
    state = unseal((folder / "state.json").read_bytes())
    state["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "state.json").write_bytes(seal(state))
    with pytest.raises(InputError, match=message):
        load_newest(run, engine, optimizer)
