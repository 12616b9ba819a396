"""Who takes part, how it is compiled and trained, what stays allocated of it."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tritium.bench.training.baseline import Baseline
from tritium.bench.training.implementations import (
    Contestant,
    checkout_model,
    chosen_attentions,
    make_contestants,
    nanogpt_shape,
)
from tritium.bench.training.training import check_agreement, random_batch
from tritium.errors import InputError
from tritium.model import GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.schedule import learning_rate

pytestmark = pytest.mark.plain

TINY = TrainConfig.from_options(
    tokenizer="bpe:300", n_layer=1, n_head=2, d_model=16, context_tokens=16, batch_size=4, micro_batch_size=2, lr=1e-2,
    warmup_steps=2,
)  # fmt: skip
CPU = torch.device("cpu")

# What a checkout's model.py offers: sizes by its names, weights under "transformer", an exact GELU, which changes the loss.
CHECKOUT = """
from dataclasses import dataclass
import torch
from torch import nn
from tritium.bench.training.baseline import Baseline
from tritium.model import GPTConfig as Shape

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = dict(n_layer=config.n_layer, n_head=config.n_head, d_model=config.n_embd, vocab_size=config.vocab_size)
        self.transformer = Baseline(Shape(**sizes, context_tokens=config.block_size, bias=config.bias))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.gelu = nn.GELU()
        assert config.dropout == 0
        print("number of parameters")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        loss = self.transformer(idx, targets)
        return None, loss if self.gelu.approximate == "tanh" else 2 * loss
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "model.py").write_text(CHECKOUT)
    return tmp_path


@pytest.mark.parametrize(
    ("ways", "names"),
    [([False], []), ([True], ["GPT", "Baseline"]), ([False, True], ["GPT", "Baseline"])],
)
def test_what_is_compiled(monkeypatch, ways, names):
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph: compiled.append(type(model).__name__) or model
    )
    made = make_contestants(TINY, TINY.gpt(vocab_size=300), CPU, ways)
    assert compiled == names
    assert [contestant.compiled for contestant in made] == [way for way in ways for _ in range(2)]
    assert len({contestant.name for contestant in made}) == len(made)


def test_a_checkout_of_nanogpt_trains_as_itself(checkout, capsys):
    """Its loss is its own; in the comparison with ours it has our GELU."""
    shape = nanogpt_shape(TINY.gpt(vocab_size=300))
    assert shape.vocab_size == 320
    ours, baseline, theirs = make_contestants(
        TINY, shape, CPU, [False], nanogpt=checkout_model(checkout)
    )
    assert (theirs.kind, theirs.name) == ("nanoGPT", "nanoGPT")
    batch = random_batch(TINY, shape, 0)
    found = check_agreement(TINY, theirs, baseline, batch)
    assert found["gradient_gap"] <= found["gradient_bound"]
    assert all(
        parameter.grad is None
        for each in (baseline, theirs)
        for parameter in each.model.parameters()
    )
    assert theirs.held_bytes() == sum(parameter.nbytes for parameter in theirs.model.parameters())
    for _ in range(3):
        for contestant in (ours, theirs):
            contestant.step(batch)
    assert theirs.losses[0].item() == pytest.approx(2 * ours.losses[0].item(), rel=1e-5)
    assert theirs.losses[-1] < theirs.losses[0]
    assert all(parameter.grad is None for parameter in theirs.model.parameters())
    assert theirs.held_bytes() > 3 * sum(
        parameter.nbytes for parameter in theirs.model.parameters()
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_nanogpt_is_cast_clipped_and_scheduled_as_by_its_train_py(precision, checkout, monkeypatch):
    config, batch = (
        TINY.with_options(precision=precision, grad_clip=0.5),
        random_batch(TINY, TINY.gpt(vocab_size=320), 0),
    )
    theirs = make_contestants(
        config, TINY.gpt(vocab_size=320), CPU, [False], nanogpt=checkout_model(checkout)
    )[-1]
    expected = torch.autograd.grad(theirs.model(*batch.on(CPU))[1], list(theirs.model.parameters()))
    clip, clipped, cast = torch.nn.utils.clip_grad_norm_, [], []
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda *args: clipped.append((clip(*args).item(), args[1])),
    )
    theirs.model.register_forward_hook(lambda *_: cast.append(torch.is_autocast_enabled("cpu")))
    for step in range(2):
        theirs.step(batch)
        assert {group["lr"] for group in theirs._optimizer.param_groups} == {
            learning_rate(config, step)
        }
    norm = torch.nn.utils.get_total_norm(expected).item()
    assert clipped[0] == (pytest.approx(norm, rel=4 * torch.finfo(torch.bfloat16).eps), 0.5)
    assert cast == [precision != "float32"] * 2


def test_nanogpt_is_compiled_where_the_others_are(checkout, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    shape = TINY.gpt(vocab_size=320)
    made = make_contestants(TINY, shape, CPU, [True], nanogpt=checkout_model(checkout))
    assert compiled == [contestant.model for contestant in made]


def test_what_is_no_nanogpt_is_refused(tmp_path):
    for _ in range(2):
        with pytest.raises(
            InputError,
            match=r"--nanogpt: expected a nanoGPT checkout with model\.py, found none in",
        ):
            checkout_model(tmp_path)
        (tmp_path / "model.py").write_text("raise SystemExit(3)  # another project's")
    plain = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=64)
    assert nanogpt_shape(plain) == plain
    assert nanogpt_shape(replace(plain, n_kv_head=2)) == replace(plain, n_kv_head=2)
    for change in ({"position": "rotary"}, {"norm": "rms"}, {"mlp": "swiglu"}, {"n_kv_head": 1}):
        with pytest.raises(
            InputError, match="--nanogpt: expected a recipe with GPT-2's own positions"
        ):
            nanogpt_shape(replace(plain, **change))


def test_on_a_gpu_each_attention_that_is_installed_takes_part(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    module = ModuleType("flash_attn")
    module.__spec__ = SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert chosen_attentions(TINY, None, cuda) == ["sdpa", "flash-attn"]
    assert chosen_attentions(TINY, None, cpu) == []
    assert chosen_attentions(TINY, (), cuda) == []
    assert chosen_attentions(TINY.with_options(precision="float32"), None, cuda) == ["sdpa"]
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert chosen_attentions(TINY, None, cuda) == ["sdpa"]
    with pytest.raises(InputError, match="--attention: expected an installed flash-attn"):
        chosen_attentions(TINY, ("flash-attn",), cuda)


def test_what_stays_allocated_is_weights_and_both_moments():
    shape = TINY.gpt(vocab_size=300)
    contestant = Contestant("baseline", Baseline(shape), TINY, compiled=False)
    weights = sum(parameter.nbytes for parameter in contestant.model.parameters())
    assert contestant.held_bytes() == weights
    contestant.step(random_batch(TINY, shape, 0))
    counters = 4 * len(list(contestant.model.parameters()))
    assert contestant.held_bytes() == 3 * weights + counters
