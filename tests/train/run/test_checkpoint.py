import json

import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.optim import Optimizer
from tritium.train.run.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

pytestmark = pytest.mark.plain

CONFIG = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=20, context_tokens=8)


def trained(seed: int, steps: int, **options):
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    optimizer = Optimizer(model, TrainConfig.from_options(**options))
    for _ in range(steps):
        tokens = torch.randint(20, (2, 8))
        optimizer.scaler.scale(model(tokens, tokens)).backward()
        optimizer.update(1e-3)
    return model, optimizer


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"precision": "float16"}], ids=str)
def test_round_trip_is_bitwise(options, run):
    model, optimizer = trained(0, 3, **options)
    folder = save_checkpoint(run, 3, model, optimizer, keep=2)
    generator = torch.get_rng_state()
    other, other_optimizer = trained(1, 1, **options)
    other_optimizer.scaler.update(8.0)
    assert load_checkpoint(folder, other, other_optimizer) == 3
    assert torch.equal(torch.get_rng_state(), generator)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        state, other_state = optimizer.states()[a], other_optimizer.states()[b]
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert torch.equal(value, other_state[key]), key
    assert optimizer.scaler.state_dict() == other_optimizer.scaler.state_dict()


def test_only_the_newest_stay(run):
    model, optimizer = trained(0, 1)
    for step in (2, 9, 10, 100):
        save_checkpoint(run, step, model, optimizer, keep=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-100"]
    assert newest_checkpoint(run).name == "step-100"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_found(run, name, damage):
    model, optimizer = trained(0, 1)
    folder = save_checkpoint(run, 1, model, optimizer, keep=1)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 4
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(InputError, match=rf"{name}: (damaged: expected SHA-256|cannot be read)"):
        load_checkpoint(folder, model, optimizer)


def test_other_models_and_other_folders_are_refused(run):
    model, optimizer = trained(0, 1)
    folder = save_checkpoint(run, 1, model, optimizer, keep=1)
    wider = GPT(GPTConfig(n_layer=1, n_head=2, d_model=32, vocab_size=20, context_tokens=8))
    with pytest.raises(
        InputError, match=r"expected h.0.attn.c_attn.bias of shape \(96,\), got \(48,\)"
    ):
        load_checkpoint(folder, wider)
    with pytest.raises(
        InputError, match="expected the checkpoint of that step, got that of step 1"
    ):
        load_checkpoint(folder.rename(folder.with_name("step-2")), model)
    with pytest.raises(InputError, match="expected a checkpoint in it, found none"):
        newest_checkpoint(run / "sub")


def test_a_flipped_bit_of_the_state_is_found(run):
    model, optimizer = trained(0, 1)
    file = save_checkpoint(run, 1, model, optimizer, keep=1) / "state.json"
    content = file.read_bytes()
    for place in range(0, len(content), 97):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if content[place : place + 1].isspace():
            continue  # the layout of JSON carries nothing
        with pytest.raises(InputError, match=r"state\.json: damaged"):
            load_checkpoint(file.parent, model)


def test_what_a_killed_process_left_goes(run):
    model, optimizer = trained(0, 1)
    (run / "checkpoints" / ".step-1.tmp").mkdir(parents=True)
    (run / "checkpoints" / ".step-1.tmp" / "model.safetensors").write_bytes(b"half")
    save_checkpoint(run, 5, model, optimizer, keep=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-5"]


def test_a_failed_write_leaves_nothing(run, monkeypatch):
    model, optimizer = trained(0, 1)
    save_checkpoint(run, 1, model, optimizer, keep=1)

    def full(path, pieces):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("tritium.train.run.checkpoint.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run, 2, model, optimizer, keep=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]


def test_state_names_what_it_covers(run):
    model, optimizer = trained(0, 1)
    state = json.loads(
        (save_checkpoint(run, 7, model, optimizer, keep=1) / "state.json").read_text()
    )
    assert state["step"] == 7
    assert set(state["files"]) == {"model.safetensors", "optimizer.safetensors"}
