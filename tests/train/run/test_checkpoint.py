import json

import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.distributed.engines import SingleProcess
from tritium.train.execution import resolve
from tritium.train.optim import Optimizer
from tritium.train.run.checkpoint import (
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
)

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


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"precision": "float16"}], ids=str)
def test_round_trip_is_bitwise(options, run):
    engine, optimizer = trained(0, 3, **options)
    folder = save_checkpoint(run, 3, engine, optimizer, keep=2)
    generator = torch.get_rng_state()
    other, other_optimizer = trained(1, 1, **options)
    other_optimizer.scaler.update(8.0)
    assert load_checkpoint(folder, other, other_optimizer) == 3
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
    folder = save_checkpoint(run, 1, engine, optimizer, keep=1)
    model = GPT(CONFIG)
    assert load_weights(folder, model) == 1
    for a, b in zip(engine.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_checkpoints_are_kept(run):
    engine, optimizer = trained(0, 1)
    for step in (2, 9, 10, 100):
        save_checkpoint(run, step, engine, optimizer, keep=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-100"]
    assert newest_checkpoint(run).name == "step-100"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_files_raise(run, name, damage):
    engine, optimizer = trained(0, 1)
    folder = save_checkpoint(run, 1, engine, optimizer, keep=1)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 4
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(InputError, match=rf"{name}: (damaged: expected SHA-256|cannot be read)"):
        load_checkpoint(folder, engine, optimizer)


def test_checkpoints_of_other_models_and_steps_raise(run):
    engine, optimizer = trained(0, 1)
    folder = save_checkpoint(run, 1, engine, optimizer, keep=1)
    wider = GPT(GPTConfig(n_layer=1, n_head=2, d_model=32, vocab_size=20, context_tokens=8))
    with pytest.raises(
        InputError, match=r"expected h.0.attn.c_attn.bias of shape \(96,\), got \(48,\)"
    ):
        load_weights(folder, wider)
    with pytest.raises(
        InputError, match="expected the checkpoint of the step in its name, got step 1"
    ):
        load_checkpoint(folder.rename(folder.with_name("step-2")), engine, optimizer)
    with pytest.raises(InputError, match="expected a checkpoint in it, found none"):
        newest_checkpoint(run / "sub")


def test_a_flipped_bit_in_the_state_raises(run):
    engine, optimizer = trained(0, 1)
    file = save_checkpoint(run, 1, engine, optimizer, keep=1) / "state.json"
    content = file.read_bytes()
    for place in range(0, len(content), 97):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if content[place : place + 1].isspace():
            continue  # white space in JSON has no meaning
        with pytest.raises(InputError, match=r"state\.json: damaged"):
            load_checkpoint(file.parent, engine, optimizer)


def test_files_of_a_killed_process_are_deleted(run):
    engine, optimizer = trained(0, 1)
    (run / "checkpoints" / ".step-1.tmp").mkdir(parents=True)
    (run / "checkpoints" / ".step-1.tmp" / "model.safetensors").write_bytes(b"half")
    save_checkpoint(run, 5, engine, optimizer, keep=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-5"]


def test_a_failed_write_leaves_no_files(run, monkeypatch):
    engine, optimizer = trained(0, 1)
    save_checkpoint(run, 1, engine, optimizer, keep=1)

    def full(path, pieces):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("tritium.train.run.checkpoint.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run, 2, engine, optimizer, keep=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]


def test_the_state_names_step_and_files(run):
    engine, optimizer = trained(0, 1)
    state = json.loads(
        (save_checkpoint(run, 7, engine, optimizer, keep=1) / "state.json").read_text()
    )
    assert state["step"] == 7
    assert set(state["files"]) == {"model.safetensors", "optimizer.safetensors"}
