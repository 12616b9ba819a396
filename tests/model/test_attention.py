"""Every row of the table of attentions gives what ours gives."""

import importlib.util
import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch

from tests.model.test_gpt import LLAMA, SMALL, random_model
from tritium.model import GPT
from tritium.model.attention import ATTENTIONS, choose_attention

pytestmark = pytest.mark.plain


@pytest.fixture
def flash_attn(monkeypatch):
    """A module with the two functions of flash-attn that are called, as its documentation states them, computed by SDPA."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")

    def flash_attn_func(q, k, v, *, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True
        ).transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
        bounds = cu_seqlens_q.tolist()
        documents = [slice(*bound) for bound in itertools.pairwise(bounds)]
        return torch.cat(
            [
                flash_attn_func(q[None, d], k[None, d], v[None, d], causal=causal)[0]
                for d in documents
            ]
        )

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(
    "config", [SMALL, LLAMA, replace(SMALL, n_kv_head=2)], ids=["gpt2", "llama", "grouped"]
)
@pytest.mark.parametrize("documents", [None, [0, 5, 12, 20, 24]], ids=["whole", "documents"])
def test_losses_and_gradients_are_those_of_ours(name, config, documents, flash_attn):
    ours = random_model(config).double()
    other = GPT(config, attention=name).double()
    other.load_state_dict(ours.state_dict())
    tokens, targets = torch.randint(
        config.vocab_size, (2, 2, 12), generator=torch.Generator().manual_seed(0)
    )
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    losses = [model(tokens, targets, cu_seqlens=cu_seqlens) for model in (ours, other)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    grads = [
        torch.autograd.grad(loss, list(model.parameters()))
        for loss, model in zip(losses, (ours, other), strict=True)
    ]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_generation_is_the_same():
    ours = random_model()
    other = GPT(SMALL, attention="sdpa")
    other.load_state_dict(ours.state_dict())
    tokens = torch.tensor([[3, 1, 4]])
    assert torch.equal(*(model.generate(tokens, 8, temperature=0.0) for model in (ours, other)))


def test_what_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="attention: expected tritium, sdpa, flash-attn, got 'flash'"
    ):
        GPT(SMALL, attention="flash")
    with pytest.raises(
        ValueError,
        match=r"an installed flash-attn, found none; pip install 'tritium\[flash-attn\]', or use tritium",
    ):
        choose_attention("flash-attn")
