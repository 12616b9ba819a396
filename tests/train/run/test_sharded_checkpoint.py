"""Checkpoints in which each rank writes its part of the weights and of the optimizer state."""

import json
import shutil

import pytest
import torch

from tritium.errors import InputError
from tritium.train.optimizer.bad_steps import is_judge_state
from tritium.train.run.models import open_model
from tritium.train.run.sharded_checkpoint import read_complete

pytestmark = pytest.mark.plain

SHARDED = ["--parallel", "fsdp", "--sharded-checkpoints", "on"]


def tensors(run, step: int = 20) -> dict[str, torch.Tensor]:
    weights, states = read_complete(run / "checkpoints" / f"step-{step}", with_optimizer=True)
    return weights | {
        f"{name}.{key}": value for name, state in states.items() for key, value in state.items()
    }


@pytest.fixture
def run(tiny, launch, tmp_path):
    """The folder of a finished run of two ranks."""
    status, _, errors = launch(2, *tiny[1:], *SHARDED, "--keep-checkpoints", 2)
    assert status == [0, 0], errors
    return tmp_path / "run"


def test_ranks_resume_bitwise_and_other_engines_to_rounding(run, launch, tmp_path):
    folder = run / "checkpoints" / "step-20"
    assert sorted(file.name for file in folder.iterdir()) == [
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
        "state.json",
    ]
    expected = tensors(run)
    state = json.loads((folder / "state.json").read_bytes())
    assert is_judge_state(state["step_judge"])
    assert state["step_judge"]["count"] == 20
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-10", "step-20"]
    for ranks, options in ((2, SHARDED), (0, [])):
        again = tmp_path / f"again-{ranks}"
        shutil.copytree(run, again)
        shutil.rmtree(again / "checkpoints" / "step-20")
        status, _, errors = launch(ranks, "--resume", again, *options)
        assert status == [0] * max(1, ranks), errors
        if ranks:
            assert all(torch.equal(value, expected[name]) for name, value in tensors(again).items())
        else:
            found = open_model(again).load().state_dict()
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [SHARDED, ["--parallel", "zero1"], ["--tensor-parallel", 2]])
def test_four_ranks_resume_the_checkpoint_of_two(options, run, launch):
    expected = tensors(run)
    shutil.rmtree(run / "checkpoints" / "step-20")
    status, _, errors = launch(4, "--resume", run, *options)
    assert status == [0] * 4, errors
    for name, value in open_model(run).load().state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_one_process_reads_the_weights_and_finds_damage(run, tritium):
    model = open_model(run).load()
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
    assert tritium("sample", run, "--prompt", "the", "--max-new-tokens", 3)[0] == 0

    folder = run / "checkpoints" / "step-20"
    shard = folder / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00002.*: damaged: expected SHA-256"):
        open_model(run).load()
    shard.unlink()
    with pytest.raises(InputError, match=r"expected the files shard-00001.*, got shard-00001"):
        open_model(run).load()
