import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tritium.bench.training.agreement import check_agreement
from tritium.bench.training.implementations import (
    choose_attentions,
    import_nanogpt,
    make_implementations,
    nanogpt_shape,
)
from tritium.bench.training.training import random_batch
from tritium.errors import InputError
from tritium.model import GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.schedule import learning_rate

pytestmark = pytest.mark.plain

TINY = TrainConfig.from_options(
    tokenizer="bpe:300",
    n_layer=1,
    n_head=2,
    d_model=16,
    context_tokens=16,
    batch_size=4,
    micro_batch_size=2,
    lr=1e-2,
    warmup_steps=2,
)
CPU = torch.device("cpu")

# A model.py with nanoGPT's interface: its names of sizes, weights under "transformer", and an exact
# GELU, which changes the loss here.
CHECKOUT = """
import types
import torch
from torch import nn
from tritium.bench.training.baseline import Baseline
from tritium.model import GPTConfig as Shape

class GPTConfig(types.SimpleNamespace):
    pass

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        shape = Shape(
            n_layer=config.n_layer, n_head=config.n_head, d_model=config.n_embd,
            vocab_size=config.vocab_size, context_tokens=config.block_size, bias=config.bias,
        )
        self.transformer = Baseline(shape)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.gelu = nn.GELU()
        assert config.dropout == 0
        print("number of parameters")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using")
        return torch.optim.AdamW(
            self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay
        )

    def forward(self, idx, targets):
        loss = self.transformer(idx, targets)
        return None, loss if self.gelu.approximate == "tanh" else 2 * loss
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "model.py").write_text(CHECKOUT)
    return tmp_path


def test_all_models_have_equal_initial_weights():
    ours, other, baseline = make_implementations(
        TINY, TINY.gpt(vocab_size=300), CPU, [False], ["sdpa"]
    )
    assert [one.kind for one in (ours, other, baseline)] == ["tritium", "tritium, sdpa", "baseline"]
    for model in (other, baseline):
        for name, weight in model.model.state_dict().items():
            assert torch.equal(weight, ours.model.state_dict()[name]), name


def test_nanogpt_agrees_with_the_baseline_and_trains(checkout, capsys):
    """Gradients are compared with the tanh form of GELU; training uses nanoGPT's own."""
    shape = nanogpt_shape(TINY.gpt(vocab_size=300))
    assert shape.vocab_size == 320
    nanogpt = import_nanogpt(checkout)
    ours, baseline, theirs = make_implementations(TINY, shape, CPU, [False], nanogpt=nanogpt)
    assert (theirs.kind, theirs.name) == ("nanoGPT", "nanoGPT")
    batch = random_batch(TINY, shape, 0)
    found = check_agreement(TINY, theirs, baseline, batch)
    assert found["gradient_gap"] <= found["gradient_bound"]
    for model in (baseline, theirs):
        assert all(parameter.grad is None for parameter in model.model.parameters())
    weights = sum(parameter.nbytes for parameter in theirs.model.parameters())
    assert theirs.held_bytes() == weights
    for _ in range(3):
        for model in (ours, theirs):
            model.step(batch)
    assert theirs.losses[0].item() == pytest.approx(2 * ours.losses[0].item(), rel=1e-5)
    assert theirs.losses[-1] < theirs.losses[0]
    assert all(parameter.grad is None for parameter in theirs.model.parameters())
    assert theirs.held_bytes() > 3 * weights
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("mlp", "factor"), [("gelu", 1), ("gelu_exact", 2)])
def test_gradients_of_nanogpt_are_compared_with_the_gelu_of_the_shape(mlp, factor, checkout):
    """The checkout doubles its loss with exact GELU."""
    config = TINY.with_options(mlp=mlp)
    shape = nanogpt_shape(config.gpt(vocab_size=300))
    nanogpt = import_nanogpt(checkout)
    ours, _, theirs = make_implementations(config, shape, CPU, [False], nanogpt=nanogpt)
    batch = random_batch(config, shape, 0)
    found, expected = (model.gradients(batch)[0].item() for model in (theirs, ours))
    assert found == pytest.approx(factor * expected, rel=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_nanogpt_uses_autocast_clipping_and_schedule_of_its_train_py(
    precision, checkout, monkeypatch
):
    config = TINY.with_options(precision=precision, grad_clip=0.5)
    shape = TINY.gpt(vocab_size=320)
    batch = random_batch(TINY, shape, 0)
    theirs = make_implementations(config, shape, CPU, [False], nanogpt=import_nanogpt(checkout))[-1]
    _, loss = theirs.model(*batch.on(CPU))
    expected = torch.autograd.grad(loss, list(theirs.model.parameters()))

    clip, clipped, autocast = torch.nn.utils.clip_grad_norm_, [], []
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda *args: clipped.append((clip(*args).item(), args[1])),
    )
    theirs.model.register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    for step in range(2):
        theirs.step(batch)
        rates = {group["lr"] for group in theirs._optimizer.param_groups}
        assert rates == {learning_rate(config, step)}
    norm = torch.nn.utils.get_total_norm(expected).item()
    assert clipped[0] == (pytest.approx(norm, rel=4 * torch.finfo(torch.bfloat16).eps), 0.5)
    assert autocast == [precision != "float32"] * 2 * (len(batch) // config.micro_batch)


def test_nanogpt_is_compiled_like_the_other_models(checkout, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    shape = TINY.gpt(vocab_size=320)
    models = make_implementations(TINY, shape, CPU, [True], nanogpt=import_nanogpt(checkout))
    assert compiled == [model.model for model in models]


def test_a_folder_without_nanogpt_raises(tmp_path):
    expected = r"nanogpt: expected a nanoGPT checkout with model\.py, found none in"
    with pytest.raises(InputError, match=expected):
        import_nanogpt(tmp_path)
    (tmp_path / "model.py").write_text("raise SystemExit(3)  # another project's")
    with pytest.raises(InputError, match=expected):
        import_nanogpt(tmp_path)


def test_nanogpt_has_the_architecture_of_gpt2_only():
    plain = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=64)
    assert nanogpt_shape(plain) == plain
    for same in ({"n_kv_head": 2}, {"mlp": "gelu_exact"}):
        assert nanogpt_shape(replace(plain, **same)) == replace(plain, **same)
    other_mlps = ({"mlp": "swiglu"}, {"mlp": "relu2"})
    for change in ({"position": "rotary"}, {"norm": "rms"}, {"n_kv_head": 1}, *other_mlps):
        with pytest.raises(InputError, match="nanogpt: expected a recipe with the positions"):
            nanogpt_shape(replace(plain, **change))


def test_on_cuda_every_installed_attention_takes_part(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    module = ModuleType("flash_attn")
    module.__spec__ = SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert choose_attentions(TINY, None, cuda) == ["sdpa", "flash-attn"]
    assert choose_attentions(TINY, None, CPU) == []
    assert choose_attentions(TINY, (), cuda) == []
    assert choose_attentions(TINY.with_options(precision="float32"), None, cuda) == ["sdpa"]
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert choose_attentions(TINY, None, cuda) == ["sdpa"]
    with pytest.raises(InputError, match="attention: expected an installed flash-attn"):
        choose_attentions(TINY, ("flash-attn",), cuda)
