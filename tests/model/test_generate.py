"""Generation with the cache, sampling options, and errors."""

from dataclasses import replace

import pytest
import torch

from tritium.model import GPT, GPTConfig
from tritium.model.generate import _choose

pytestmark = pytest.mark.plain

CONFIG = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=50, context_tokens=16, n_kv_head=1)


@pytest.fixture(params=["learned", "rotary"])
def model(request) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(CONFIG, position=request.param))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def test_cache_gives_the_tokens_of_full_forwards(model):
    prompt = torch.randint(50, (3, 4))
    out = model.generate(prompt, 12, temperature=0)
    assert torch.equal(out[:, :4], prompt)
    expected = prompt
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, expected)


def test_full_context_continues_from_its_later_half(model):
    prompt = torch.randint(50, (1, 16))
    out = model.generate(prompt, 3, temperature=0)
    assert out[0, 16] == model(prompt)[:, -1].argmax(-1)
    assert out[0, 17] == model(out[:, 9:17])[:, -1].argmax(-1)


def test_prompt_may_be_longer_than_the_context(model):
    assert model.generate(torch.randint(50, (1, 40)), 30, seed=0).shape == (1, 70)


def test_context_of_one_token_generates():
    model = GPT(replace(CONFIG, context_tokens=1))
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    assert model.generate(prompt, 3).shape == (1, 4)


def test_same_seed_gives_the_same_tokens(model):
    prompt = torch.randint(50, (2, 3))
    first = model.generate(prompt, 10, seed=1)
    assert torch.equal(model.generate(prompt, 10, seed=1), first)
    assert not torch.equal(model.generate(prompt, 10, seed=2), first)


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-40}], ids=str
)
def test_limit_of_each_option_takes_the_most_likely_token(model, options):
    prompt = torch.randint(50, (2, 3))
    greedy = model.generate(prompt, 10, temperature=0)
    assert torch.equal(model.generate(prompt, 10, seed=3, **options), greedy)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.5, {1}),  # the most likely token alone reaches it
        (0.6, {1, 3}),
        (0.81, {0, 1, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(_choose(logits, 1.0, None, top_p, generator).tolist()) == kept


def test_generation_stops_when_every_sequence_has_produced_the_stop_token(model):
    prompt = torch.randint(50, (1, 2))
    stop = int(model.generate(prompt, 1, temperature=0)[0, -1])
    assert model.generate(prompt, 10, temperature=0, stop_token=stop).shape == (1, 3)


def test_no_new_tokens_returns_the_prompt(model):
    prompt = torch.randint(50, (2, 3))
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_generation_works_under_autocast(model):
    """The dtype of keys and values then differs from the weights' dtype."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(torch.randint(50, (2, 3)), 20, seed=0).shape == (2, 23)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ({"temperature": -1.0}, "temperature must be 0 or more and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ],
)
def test_option_out_of_range_raises(options, message):
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="^generate: " + message):
        GPT(CONFIG).generate(prompt, **{"max_new_tokens": 1, **options})


def test_empty_prompt_raises():
    prompt = torch.zeros(1, 0, dtype=torch.int64)
    message = r"^generate: tokens must be \(B, T\) with T at least 1, got \(1, 0\)"
    with pytest.raises(ValueError, match=message):
        GPT(CONFIG).generate(prompt, 1)
