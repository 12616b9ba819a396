"""Dropout: the seeds of its masks, and models that drop branches, embeddings and attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.model import plain
from tests.model.models import LLAMA, SMALL, random_model
from tritium.model import GPT, GPTConfig
from tritium.model.choices import RECOMPUTATIONS
from tritium.model.config import DROPOUTS
from tritium.model.context import dropout_seeds

ALL = dict.fromkeys(DROPOUTS, 0.3)
CONFIGS = {
    "branches": replace(SMALL, dropout=0.3),
    "embedding": replace(SMALL, embedding_dropout=0.3),
    "attention": replace(SMALL, attention_dropout=0.3),
    "llama": replace(LLAMA, **ALL, n_kv_head=2, tied_head=False),
}
SEED = torch.tensor(5)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: GPT, loss: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])


def with_dropout(model: GPT, **options) -> GPT:
    """The same weights in a model with other options."""
    other = GPT(replace(model.config, **ALL), **options)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.plain
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_match_plain_pytorch_with_the_same_masks(config):
    model = random_model(config).double()
    tokens, targets = random_tokens(2, 2, 21)
    seeds = dropout_seeds(SEED, config.n_layer)
    found = model(tokens, targets, dropout_seed=SEED)
    logits = plain.logits(model, tokens, seeds)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(
        loss_and_gradients(model, found), loss_and_gradients(model, expected), rtol=1e-7, atol=1e-10
    )
    assert not torch.allclose(logits, plain.logits(model, tokens), rtol=0.1, atol=0.1)


@pytest.mark.plain
def test_nothing_is_dropped_in_evaluation_mode_and_in_generation():
    model = random_model(SMALL)
    other = with_dropout(model)
    tokens = random_tokens(2, 12)
    assert torch.equal(other.eval()(tokens), model(tokens))
    other.train()
    assert not torch.equal(other(tokens), model(tokens))
    expected = model.generate(tokens, 8, temperature=0)
    assert torch.equal(other.generate(tokens, 8, temperature=0), expected)


@pytest.mark.plain
def test_masks_depend_on_the_seed_alone():
    model = random_model(replace(SMALL, **ALL))
    tokens = random_tokens(2, 12)
    first = model(tokens, dropout_seed=SEED)
    torch.rand(3)
    assert torch.equal(model(tokens, dropout_seed=SEED), first)
    assert not torch.equal(model(tokens, dropout_seed=SEED + 1), first)


@pytest.mark.plain
def test_default_seed_is_drawn_from_pytorchs_generator():
    model = random_model(replace(SMALL, **ALL))
    tokens = random_tokens(2, 12)
    torch.manual_seed(3)
    first, second = model(tokens), model(tokens)
    torch.manual_seed(3)
    assert torch.equal(model(tokens), first)
    assert not torch.equal(first, second)


@pytest.mark.plain
def test_no_two_masks_of_small_seeds_are_equal():
    """Also not in different layers of different forwards."""
    seeds = torch.cat([dropout_seeds(torch.tensor(seed), 48)[:, 0] for seed in range(100)])
    assert len(seeds.unique()) == 100 * (3 * 48 + 1)


@pytest.mark.plain
def test_seeds_are_aligned_to_16_bytes():
    seeds = dropout_seeds(SEED, 2)
    assert all(row[0].storage_offset() * row.element_size() % 16 == 0 for row in seeds)


@pytest.mark.plain
@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_a_recomputed_block_drops_the_same_elements(config):
    tokens = random_tokens(2, 12)
    results = {}
    for mode, row in RECOMPUTATIONS.items():
        if row.fits(config):
            model = with_dropout(random_model(config), recompute=mode)
            loss = model(tokens, tokens, dropout_seed=SEED)
            results[mode] = loss_and_gradients(model, loss)
    for mode, result in results.items():
        assert torch.equal(result, results["none"]), mode


@pytest.mark.slow
def test_dropout_compiles_as_one_graph():
    model = random_model(replace(SMALL, **ALL))
    tokens = random_tokens(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(tokens, tokens, dropout_seed=SEED), model(tokens, tokens, dropout_seed=SEED)
    )
    torch._dynamo.reset()


@pytest.mark.plain
@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_probability_outside_its_range_raises(name, value):
    with pytest.raises(ValueError, match=f"GPTConfig: {name}: .* less than 1, got {value}"):
        GPTConfig(**{name: value})


@pytest.mark.plain
def test_an_attention_without_seeds_raises_in_training_only():
    """A published GPT-2 has attention dropout in its configuration."""
    model = GPT(replace(SMALL, attention_dropout=0.1), attention="sdpa")
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not support attention_dropout"):
        model(tokens)
    assert model.eval()(tokens).isfinite().all()
