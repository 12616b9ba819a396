"""Prefix tuning: the model, its cache, and the files of PEFT."""

import json
from dataclasses import replace

import pytest
import torch

from tests.model.models import LLAMA, SMALL, random_model
from tritium.errors import InputError
from tritium.model import GPT
from tritium.model.cost import parameters
from tritium.model.generation.cache import KVCache
from tritium.model.lora import base_sha256
from tritium.model.prefix import add_prefix, load_prefix, save_prefix

pytestmark = pytest.mark.plain

CONFIGS = {
    "gelu": SMALL,
    "llama": replace(LLAMA, n_kv_head=2, tied_head=False),
    "sinusoidal": replace(SMALL, position="sinusoidal", window=9),
}
TOKENS = torch.arange(30).view(2, 15) % SMALL.vocab_size
P = 5


def with_prefix(config=SMALL, seed=0) -> GPT:
    model = random_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)
    torch.manual_seed(seed)
    add_prefix(model, P, torch.randn(P, config.n_layer * 2 * config.kv_heads * config.head_size))
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_prefix_made_from_tokens_gives_the_logits_after_these_tokens(config):
    """Keys and values of real tokens, as a prefix: the model sees these tokens."""
    model = random_model(config).eval()
    before = torch.arange(P)[None] + 40
    expected = model(torch.cat((before, TOKENS[:1]), dim=1))[:, P:]
    cache = KVCache(config, 1)
    model(before, cache=cache)
    both = torch.stack((cache.keys[:, 0, :P], cache.values[:, 0, :P]), dim=1)  # (L, 2, P, G, K)
    add_prefix(model, P, both.permute(2, 0, 1, 3, 4).flatten(1))
    torch.testing.assert_close(model(TOKENS[:1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_generation_uses_the_prefix(config):
    model = with_prefix(config)
    for prompts in ([[3], [4, 5, 6]], [[7, 8]]):
        found = model.generate(prompts, 6, temperature=0.0)
        for prompt, tokens in zip(prompts, found, strict=True):
            expected = list(prompt)
            for _ in range(6):
                logits = model(torch.tensor([expected]))
                expected.append(int(logits[0, -1].argmax()))
            assert tokens == expected


def test_the_context_is_shorter_and_generation_goes_on_after_it():
    model = with_prefix()
    assert model.config.context_tokens == SMALL.context_tokens - P
    assert model.wpe.weight.shape[0] == SMALL.context_tokens
    with pytest.raises(ValueError, match="context_tokens is 19, got 20 tokens"):
        model(torch.zeros(1, 20, dtype=int))
    assert len(model.generate([[1, 2]], 40, temperature=0.0)[0]) == 42
    with pytest.raises(ValueError, match="expected no cu_seqlens in a model with a prefix"):
        model(TOKENS, cu_seqlens=torch.tensor([0, 30], dtype=torch.int32))
    with pytest.raises(
        ValueError, match="prefix_tokens: expected less than the context of 24 tokens"
    ):
        SMALL.with_prefix(24)


def test_the_prefix_has_a_gradient():
    model = with_prefix()
    model(TOKENS, TOKENS).backward()
    assert model.prefix.grad.abs().min() > 0
    assert parameters(model.config) == parameters(SMALL) + model.prefix.numel()
    again = GPT(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(TOKENS), model(TOKENS))


def test_a_saved_prefix_is_loaded_and_checked(tmp_path):
    model = with_prefix()
    sha256 = base_sha256(model)
    save_prefix(model, tmp_path / "prefix", base="base", base_sha256=sha256)
    base = with_prefix(seed=1)
    assert base_sha256(base) == sha256
    base.config = base.config.with_prefix(0)
    load_prefix(base, tmp_path / "prefix", sha256)
    assert torch.equal(base(TOKENS), model(TOKENS))
    with pytest.raises(InputError, match="another model of the same shape"):
        load_prefix(base, tmp_path / "prefix", "0" * 64)
    deep = random_model(replace(SMALL, n_layer=3))
    with pytest.raises(InputError, match=r"expected shape \(5, 192\), got \(5, 128\)"):
        load_prefix(deep, tmp_path / "prefix", sha256)


@pytest.mark.parametrize("name", ["gelu", "llama"])
def test_peft_computes_the_same_logits(name, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = with_prefix(CONFIGS[name])
    base = with_prefix(CONFIGS[name])
    base.config = base.config.with_prefix(0)
    base.prefix = None
    base.save_pretrained(tmp_path / "base")
    save_prefix(model, tmp_path / "prefix", base=str(tmp_path / "base"), base_sha256="")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "prefix").eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)
    # And a prefix that PEFT wrote.
    theirs.save_pretrained(tmp_path / "theirs")
    load_prefix(base, tmp_path / "theirs", "")
    torch.testing.assert_close(base(TOKENS), expected, rtol=0, atol=1e-5)


def test_the_written_configuration_has_the_width_of_the_keys(tmp_path):
    model = with_prefix(replace(LLAMA, n_kv_head=2))
    save_prefix(model, tmp_path / "prefix", base="base", base_sha256="0")
    fields = json.loads((tmp_path / "prefix" / "adapter_config.json").read_text())
    assert fields["token_dim"] * 2 * fields["num_layers"] == model.prefix.shape[1]
    assert fields["num_virtual_tokens"] == P


def test_a_prefix_as_long_as_the_context_raises(tmp_path):
    save_prefix(with_prefix(), tmp_path / "prefix", base="base", base_sha256="0")
    short = random_model(replace(SMALL, context_tokens=P))
    with pytest.raises(InputError, match=f"expected fewer prefix tokens than the context of {P}"):
        load_prefix(short, tmp_path / "prefix", "0")
