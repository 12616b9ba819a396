from dataclasses import replace

import pytest
import torch

from tritium.model import GPT, GPTConfig

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


def test_the_cache_changes_nothing(model):
    prompt = torch.randint(50, (3, 4))
    out = model.generate(prompt, 12, temperature=0)
    assert torch.equal(out[:, :4], prompt)
    expected = prompt
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, expected)


def test_a_full_context_goes_on_from_its_later_half(model):
    prompt = torch.randint(50, (1, 16))
    out = model.generate(prompt, 3, temperature=0)
    first = model(prompt)[:, -1].argmax(-1)
    assert out[0, 16] == first
    assert out[0, 17] == model(out[:, 9:17])[:, -1].argmax(-1)
    assert model.generate(torch.randint(50, (1, 40)), 30, seed=0).shape == (1, 70)


def test_seeds_and_options(model):
    prompt = torch.randint(50, (2, 3))
    assert torch.equal(model.generate(prompt, 10, seed=1), model.generate(prompt, 10, seed=1))
    assert not torch.equal(model.generate(prompt, 10, seed=1), model.generate(prompt, 10, seed=2))
    greedy = model.generate(prompt, 10, temperature=0)
    assert torch.equal(model.generate(prompt, 10, top_k=1, seed=3), greedy)
    assert torch.equal(model.generate(prompt, 10, top_p=1e-6, seed=3), greedy)


def test_top_p_keeps_the_fewest_tokens_that_reach_it(model):
    from tritium.model.generate import _choose

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])].expand(4000, 4)
    # Probabilities 0.15, 0.5, 0.05, 0.3: half is reached by the likeliest alone, 0.6 by two, 0.81 by three.
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in [(0.5, {1}), (0.6, {1, 3}), (0.81, {0, 1, 3}), (1.0, {0, 1, 2, 3})]:
        assert set(_choose(logits, 1.0, None, top_p, generator).tolist()) == kept


def test_stops_when_every_sequence_has_ended(model):
    prompt = torch.randint(50, (1, 2))
    stop = int(model.generate(prompt, 1, temperature=0)[0, -1])
    assert model.generate(prompt, 10, temperature=0, stop_token=stop).shape == (1, 3)


def test_under_autocast(model):
    """Keys and values are then of another dtype than the weights."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(torch.randint(50, (2, 3)), 20, seed=0).shape == (2, 23)


def test_a_context_of_one_token_and_tiny_temperatures(model):
    from dataclasses import replace

    assert GPT(replace(CONFIG, context_tokens=1)).generate(
        torch.zeros(1, 1, dtype=torch.int64), 3
    ).shape == (1, 4)
    prompt = torch.randint(50, (2, 3))
    greedy = model.generate(prompt, 5, temperature=0)
    assert torch.equal(model.generate(prompt, 5, temperature=1e-40, seed=0), greedy)
    assert torch.equal(model.generate(prompt, 0), prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ],
)
def test_options_out_of_range_are_named(model, options, message):
    with pytest.raises(ValueError, match="^generate: " + message):
        model.generate(torch.zeros(1, 1, dtype=torch.int64), 1, **options)
    with pytest.raises(ValueError, match="T at least 1, got \\(1, 0\\)"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 1)
