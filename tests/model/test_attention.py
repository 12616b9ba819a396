"""Each implementation of attention gives the same model."""

import itertools
import re
import sys
import types
from dataclasses import replace

import pytest
import torch

from tests.model.models import LLAMA, SMALL, random_model
from tritium.model import GPT
from tritium.model.choices import ATTENTIONS

pytestmark = pytest.mark.plain


@pytest.fixture
def flash_attn(monkeypatch):
    """Install a stand-in for flash-attn: its two functions, with its signatures."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")

    def flash_attn_func(q, k, v, *, causal, window_size, softcap):
        assert causal
        T = q.shape[1]
        before, after = window_size
        token = torch.arange(T)
        distance = token[:, None] - token
        is_hidden = (distance < 0) | (distance > (T if before < 0 else before))
        assert after == (-1 if before < 0 else 0)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        s = q @ k.mT / q.shape[-1] ** 0.5
        s = softcap * torch.tanh(s / softcap) if softcap else s
        return (s.masked_fill(is_hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
        outputs = []
        for start, stop in itertools.pairwise(cu_seqlens_q.tolist()):
            document = (None, slice(start, stop))
            o = flash_attn_func(q[document], k[document], v[document], **options)
            outputs.append(o[0])
        return torch.cat(outputs)

    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        LLAMA,
        replace(SMALL, n_kv_head=2, window=3),
        replace(SMALL, softcap=2.0),
        replace(LLAMA, qk_norm=True),
    ],
    ids=["gpt2", "llama", "grouped_window", "softcap", "qk_norm"],
)
@pytest.mark.parametrize("bounds", [None, [0, 5, 12, 20, 24]], ids=["rows", "documents"])
def test_implementations_give_the_same_loss_and_gradients(name, config, bounds, flash_attn):
    if any(getattr(config, option) for option in ATTENTIONS[name].unsupported):
        with pytest.raises(ValueError, match=f"got {name}, which does not support softcap"):
            GPT(config, attention=name)
        return
    baseline = random_model(config).double()
    model = GPT(config, attention=name).double()
    model.load_state_dict(baseline.state_dict())
    tokens, targets = torch.randint(
        config.vocab_size, (2, 2, 12), generator=torch.Generator().manual_seed(0)
    )
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)

    loss = model(tokens, targets, cu_seqlens=cu_seqlens)
    expected_loss = baseline(tokens, targets, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)

    loss.backward()
    expected_loss.backward()
    for parameter, expected in zip(model.parameters(), baseline.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_document_continues_in_the_next_row_only_where_it_may(name, flash_attn):
    tokens = torch.arange(24).view(2, 12)
    cu_seqlens = torch.tensor([0, 5, 20, 24], dtype=torch.int32)
    baseline = random_model()
    model = GPT(SMALL, attention=name)
    model.load_state_dict(baseline.state_dict())
    if not ATTENTIONS[name].spans_rows:
        with pytest.raises(ValueError, match="a document must begin with each row of 12 tokens"):
            model(tokens, cu_seqlens=cu_seqlens)
        return
    logits = model(tokens, cu_seqlens=cu_seqlens).flatten(0, 1)
    parts = [baseline(part[None])[0] for part in tokens.flatten().split((5, 15, 4))]
    torch.testing.assert_close(logits, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_generation_does_not_depend_on_the_implementation():
    baseline = random_model()
    model = GPT(SMALL, attention="sdpa")
    model.load_state_dict(baseline.state_dict())
    tokens = torch.tensor([[3, 1, 4]])
    expected = baseline.generate(tokens, 8, temperature=0.0)
    assert torch.equal(model.generate(tokens, 8, temperature=0.0), expected)


def test_unknown_attention_raises():
    message = "attention: unknown implementation 'sdpaa'; did you mean 'sdpa'?"
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT(SMALL, attention="sdpaa")
