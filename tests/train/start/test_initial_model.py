"""tritium train --init-from: a run that starts with the weights of a trained model."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.model.test_weights import change_config
from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.model.cost import parameters
from tritium.train.run.metrics import read_metrics
from tritium.train.start import initial_model as module

pytestmark = pytest.mark.plain


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


@pytest.fixture
def options(tiny):
    """The words of `tiny` that are not about the shape of the model or its tokenizer."""
    words = []
    for name, value in zip(tiny[2::2], tiny[3::2], strict=True):
        if name not in ("--n-layer", "--n-head", "--d-model", "--context-tokens", "--tokenizer"):
            words += [name, value]
    return ["train", "laptop", *words]


@pytest.mark.parametrize("source", ["run", "run/checkpoints/step-20", "exported"])
def test_a_run_starts_with_the_weights_it_was_given(source, tiny, options, tritium, tmp_path):
    assert tritium(*tiny)[0] == 0
    assert tritium("export", tmp_path / "run", tmp_path / "exported")[0] == 0
    second = tmp_path / "second"
    words = ("--out", second, "--steps", 10, "--init-from", tmp_path / source)
    status, _, err = tritium(*options, *words)
    assert status == 0, err
    first, initial = weights(tmp_path / "run", 20), weights(second, 0)
    for name, value in first.items():
        vocabulary = 257 if name == "wte.weight" else None
        assert torch.equal(value[:vocabulary], initial[name][:vocabulary]), name
    losses = [read_metrics(run)[0][0]["loss"] for run in (tmp_path / "run", second)]
    assert losses[1] < losses[0]


def test_dropout_is_that_of_the_run(tiny, options, tritium, tmp_path):
    assert tritium(*tiny)[0] == 0
    assert tritium("export", tmp_path / "run", tmp_path / "exported")[0] == 0
    change_config(tmp_path / "exported", attn_pdrop=0.1)
    losses = []
    for dropout, attention in ((0.5, "tritium"), (0.0, "sdpa")):  # sdpa has no dropout
        out = tmp_path / attention
        words = ("--dropout", dropout, "--attention", attention, "--steps", 1, "--out", out)
        status, _, err = tritium(*options, *words, "--init-from", tmp_path / "exported")
        assert status == 0, err
        losses.append(read_metrics(out)[0][0]["loss"])
    assert abs(losses[0] - losses[1]) > 0.01


def test_a_resumed_run_does_not_need_the_model_it_started_from(tiny, options, tritium, tmp_path):
    assert tritium(*tiny)[0] == 0
    second = tmp_path / "second"
    assert tritium(*options, "--out", second, "--init-from", tmp_path / "run")[0] == 0
    before = weights(second, 20)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(second / "checkpoints" / "step-20")
    assert tritium("train", "--resume", second)[0] == 0
    assert all(torch.equal(before[name], value) for name, value in weights(second, 20).items())


def test_models_that_do_not_fit_are_one_line(tiny, options, tritium, error_of, tmp_path):
    assert tritium(*tiny)[0] == 0
    second = ("--out", tmp_path / "second", "--init-from")
    assert "expected a run, a checkpoint" in error_of(*options, *second, tmp_path / "none")
    line = error_of(*options, "--n-layer", 3, *second, tmp_path / "run")
    assert "--n-layer: expected 1, as in" in line
    assert "got 3; leave it out" in line
    words = ("--tokenizer", "chars", "--prompt", "the")
    line = error_of(*options, *words, *second, tmp_path / "run")
    assert "--tokenizer: expected bytes of" in line
    other = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=100, context_tokens=16)
    GPT(other).save_pretrained(tmp_path / "published")
    line = error_of(*options, "--tokenizer", "bytes", *second, tmp_path / "published")
    assert "--tokenizer: expected 100 tokens, as in" in line
    line = error_of(*options, *second, tmp_path / "published")
    assert "which has 100 tokens, got none; the model came without one" in line
    file = tmp_path / "run" / "checkpoints" / "step-20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in error_of(*options, *second, tmp_path / "run")
    assert not (tmp_path / "second").exists()


def test_weights_may_be_as_large_as_the_memory(monkeypatch):
    shape = GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=10, context_tokens=4)
    weight_bytes = 4 * parameters(shape)
    for memory_bytes in (None, weight_bytes):
        monkeypatch.setattr(module, "host_bytes", lambda size=memory_bytes: size)
        module._check_weights_fit(shape)
    monkeypatch.setattr(module, "host_bytes", lambda: weight_bytes - 1)
    with pytest.raises(InputError, match="expected weights that fit into the 0 GB of memory"):
        module._check_weights_fit(shape)


@pytest.mark.parametrize("size", [("--n-layer", 10**8), ("--d-model", 10**9)])
def test_a_model_that_is_larger_than_the_memory_is_one_line(size, tiny, tritium, tmp_path):
    status, _, err = tritium(*tiny, *size)
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("tritium: the model: expected weights that fit into the ")
    assert line.endswith(" bytes each; give smaller sizes, such as --n-layer or --d-model")
    assert not (tmp_path / "run").exists()
