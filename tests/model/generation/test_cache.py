from dataclasses import replace

import pytest
import torch

from tests.model.models import LLAMA, SMALL, random_model
from tritium.model.cost import cache_bytes
from tritium.model.generation import KVCache, Prefill

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_cached_logits_match_full_forwards(config):
    """Sequences of lengths 5 and 2, then three tokens at once, then one."""
    model = random_model(config)
    tokens = torch.randint(90, (2, 9))
    cache = KVCache(config, 2)
    with torch.no_grad():
        assert model(tokens[:, :5], cache=Prefill(cache, torch.tensor([0, 1]))) is None
        cache.set_lengths([0, 1], [5, 2])
        new = torch.stack([tokens[0, 5:], tokens[1, 2:6]])
        found = torch.cat([model(new[:, :3], cache=cache), model(new[:, 3:], cache=cache)], dim=1)
        full = model(tokens)
    assert cache.host_lengths == cache.lengths.tolist() == [9, 6]
    torch.testing.assert_close(found[0], full[0, 5:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], full[1, 2:6], rtol=1e-4, atol=1e-5)


def test_finished_sequences_stay_empty_and_do_not_change_others():
    model = random_model()
    cache = KVCache(SMALL, 3, capacity=4)
    with torch.no_grad():
        model(torch.ones(3, 4, dtype=torch.int64), cache=cache)
        cache.finish([1])
        cache.set_lengths([0, 2], [1, 3])
        before = cache.keys.clone()
        model(torch.ones(3, 1, dtype=torch.int64), cache=cache)
    assert cache.lengths.tolist() == cache.host_lengths == [2, 0, 4]
    changed = (cache.keys != before).flatten(3).any(-1).any(0).nonzero().tolist()
    assert all(slot in ([0, 1], [1, 0], [2, 3]) for slot in changed)


def test_prefill_writes_only_to_its_rows():
    model = random_model()
    cache = KVCache(SMALL, 3)
    with torch.no_grad():
        model(torch.ones(3, 2, dtype=torch.int64), cache=cache)
        before = cache.values.clone()
        model(torch.full((1, 6), 7), cache=Prefill(cache, torch.tensor([1])))
    assert torch.equal(cache.values[:, [0, 2], :2], before[:, [0, 2], :2])
    assert not torch.equal(cache.values[:, 1, :2], before[:, 1, :2])


def test_cache_holds_the_bytes_of_the_formula():
    model = random_model(replace(LLAMA, n_kv_head=2))
    cache = KVCache(model.config, 3, capacity=10)
    with torch.no_grad():
        model(torch.ones(3, 1, dtype=torch.int64), cache=cache)
    assert cache.keys.nbytes + cache.values.nbytes == cache_bytes(model.config, 3, 10, 4)


def test_the_head_is_cast_once():
    cache = KVCache(SMALL, 1)
    weight = torch.randn(3, 2)
    assert cache.cast_once(weight, torch.float32) is weight
    cast = cache.cast_once(weight, torch.bfloat16)
    assert torch.equal(cast, weight.bfloat16())
    assert cache.cast_once(weight, torch.bfloat16) is cast


def test_more_tokens_than_the_capacity_raise():
    message = "KVCache: expected at most 4 tokens, got 5; make a cache with a larger capacity"
    with pytest.raises(ValueError, match=message):
        random_model()(torch.zeros(1, 5, dtype=torch.int64), cache=KVCache(SMALL, 1, capacity=4))


def test_more_tokens_in_a_long_cache_than_the_context_raise():
    """Rotary positions have no table whose end would raise."""
    model, cache = random_model(LLAMA), KVCache(LLAMA, 1, capacity=30)
    with torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.int64), cache=cache)
        with pytest.raises(ValueError, match="GPT: context_tokens is 24, got 25 tokens"):
            model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)


def test_copies_of_sequences_go_on_without_changing_the_cache():
    model = random_model()
    tokens = torch.randint(90, (2, 9))
    cache = KVCache(SMALL, 2, capacity=5)
    new = torch.randint(90, (3, 2))
    with torch.no_grad():
        model(tokens[:, :5], cache=Prefill(cache, torch.tensor([0, 1])))
        cache.set_lengths([0, 1], [5, 2])
        copy = cache.select([0, 1, 1], more=2)
        found = model(new, cache=copy)
        texts = [tokens[0, :5], tokens[1, :2], tokens[1, :2]]
        full = [
            model(torch.cat([text, more])[None])[0, -2:]
            for text, more in zip(texts, new, strict=True)
        ]
    torch.testing.assert_close(found, torch.stack(full), rtol=1e-4, atol=1e-5)
    assert copy.lengths.tolist() == [7, 4, 4]
    assert cache.lengths.tolist() == cache.host_lengths == [5, 2]
