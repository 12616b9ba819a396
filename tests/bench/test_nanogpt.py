"""The comparison, run for real against a stand-in with nanoGPT's interface: its numbers, not its speed, are under test."""

import json
import runpy
import sys

import pytest

from tritium.bench.nanogpt import compare, prepare_checkout

pytestmark = pytest.mark.plain

TRAIN = """
import sys, torch
steps = int(next(word for word in sys.argv if word.startswith("--max_iters=")).split("=")[1])
from model import GPT, GPTConfig
args = dict(block_size=4)
import os; os.makedirs("out", exist_ok=True)
torch.save({"model": GPT(GPTConfig(**args)).state_dict(), "model_args": args}, "out/ckpt.pt")
for i in range(steps + 1):
    print(f"iter {i}: loss {3.0:.4f}, time {25.0 if i else 900.0:.2f}ms, mfu 0.01%")
print("step 5: train loss 2.0000, val loss 2.1250")
"""
MODEL = """
import torch
class GPTConfig:
    def __init__(self, block_size): self.block_size = block_size
class GPT(torch.nn.Module):
    def __init__(self, config): super().__init__()
    def forward(self, x, y): return None, torch.tensor(1.75)
"""
PREPARE = """
import os, requests, numpy as np
here = os.path.dirname(__file__)
text = open(os.path.join(here, "input.txt")).read()
np.array([ord(c) for c in text], dtype=np.uint16).tofile(os.path.join(here, "val.bin"))
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "nanoGPT"
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    (folder / "config").mkdir()
    (folder / "config" / "train_shakespeare_char.py").write_text("")
    (folder / "train.py").write_text(TRAIN)
    (folder / "model.py").write_text(MODEL)
    (folder / "data" / "shakespeare_char" / "prepare.py").write_text(PREPARE)
    return folder


def test_figures_come_from_both_programs(checkout, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question:\n" * 100)
    result = compare(checkout, text, rounds=1, steps=30)
    assert result["steps_per_second"]["nanogpt"] == pytest.approx(40.0)  # the median passes over the slow first step
    assert result["steps_per_second"]["tritium"] > 0
    assert result["ratio"] == pytest.approx(result["steps_per_second"]["tritium"] / 40.0)
    assert result["nanogpt_sampled_val_loss"] == [2.125]
    assert result["val_loss"]["nanogpt"] == [1.75]
    assert 0 < result["val_loss"]["tritium"][0] < 5
    assert not (checkout / "out").exists(), "the checkout itself stays as it was"
    json.dumps(result)


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(SystemExit, match=r"expected a nanoGPT checkout with train\.py"):
        prepare_checkout(tmp_path, tmp_path / "text.txt", tmp_path)


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanogpt", "--help"])
    monkeypatch.delitem(sys.modules, "tritium.bench.nanogpt")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tritium.bench.nanogpt", run_name="__main__")
    assert stop.value.code == 0
    assert "nanoGPT checkout" in capsys.readouterr().out
