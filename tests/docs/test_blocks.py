"""The Python blocks of the documentation run, in the order of their page."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tritium
from tritium.kernels import causal_attention
from tritium.train import session

from .pages import DOCS, PAGES, blocks, name

pytestmark = pytest.mark.plain

# test_tutorial.py runs the tutorial, whose blocks need the commands between them.
PYTHON = [page for page in PAGES if page.name != "tutorial.md" and blocks(page, "python")]


def names_of_kernels_page() -> dict:
    """Return the names that blocks of kernels.md expect from the reader's own program."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=16)
    model = GPT2LMHeadModel(config).train()
    tokens = torch.randint(64, (2, 8))
    q, k, v = torch.randn(3, 1, 4, 2, 16)
    return {
        "model": model,
        "trainer": SimpleNamespace(train=lambda: model(tokens, labels=tokens).loss.backward()),
        "torch": torch,
        "causal_attention": causal_attention,
        "cross_entropy": tritium.kernels.cross_entropy,
        **{"q": q, "k": k, "v": v, "sink": torch.zeros(2)},
        **{"logits": torch.randn(4, 8), "target": torch.tensor([1, 2, -100, 3])},
    }


def make_run(folder: Path) -> None:
    """Write what finetuning.md expects: runs/laptop-1 and records.jsonl."""
    text = "the quick brown fox jumps over a lazy dog\n" * 200
    (folder / "my.txt").write_text(text)
    record = {"instruction": "Say yes.", "input": "", "output": "Yes."}
    (folder / "records.jsonl").write_text((json.dumps(record) + "\n") * 9)
    options = {
        **{"tokenizer": "bytes", "device": "cpu", "n_layer": 1, "n_head": 2, "d_model": 16},
        **{"context_tokens": 64, "steps": 2, "batch_size": 2, "eval_tokens": 64},
        "sample_tokens": 2,
    }
    tritium.train("laptop", data="my.txt", **options)


SETUP = {
    DOCS / "kernels.md": lambda folder: names_of_kernels_page(),
    DOCS / "finetuning.md": make_run,
}


def run_blocks(page: Path, folder: Path) -> None:
    setup = SETUP.get(page, lambda folder: None)
    examples = blocks(page, "python")
    examples[0].namespace.update(setup(folder) or {})
    for example in examples:
        example.evaluate()  # raises for a block that fails


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    # Drawing takes longer than the steps.
    monkeypatch.setattr(session, "plot_loss", lambda run: None)
    return tmp_path


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_blocks_run(page, folder):
    run_blocks(page, folder)
