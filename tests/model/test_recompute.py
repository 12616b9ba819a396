"""Whatever is computed again, losses and gradients have the same bits, with gelu where rows are no more than a chunk."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.model import GPT, GPTConfig
from tritium.model.recompute import RECOMPUTATIONS, check_recompute
from tritium.train.precision import working_copy

pytestmark = pytest.mark.plain

SMALL = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=50, context_tokens=16)
LLAMA = replace(SMALL, position="rotary", norm="rms", mlp="swiglu", bias=False)
DOCUMENTS = torch.tensor([0, 5, 16, 25, 32], dtype=torch.int32)


def gradients(
    config, mode, *, attention="tritium", dtype=torch.float32, cu_seqlens=None, compiled=False
):
    """Loss and gradients, in one row."""
    torch.manual_seed(0)
    model = GPT(config, attention=attention, recompute=mode)
    network = working_copy(model, dtype)
    if compiled:
        torch._dynamo.reset()
        network = torch.compile(network, fullgraph=True, backend="aot_eager")
    tokens, targets = torch.randint(50, (2, 2, 16))
    loss = network(tokens, targets, cu_seqlens=cu_seqlens)
    loss.backward()
    return torch.cat(
        [loss.detach()[None], *(parameter.grad.flatten() for parameter in model.parameters())]
    )


@pytest.mark.parametrize("attention", ["tritium", "sdpa"])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_gradients_are_bitwise_those_of_no_recomputation(config, dtype, cu_seqlens, attention):
    options = {"dtype": dtype, "cu_seqlens": cu_seqlens, "attention": attention}
    expected = gradients(config, "none", **options)
    assert expected.isfinite().all()
    for mode in ("gelu", "selective", "block") if config.mlp == "gelu" else ("selective", "block"):
        assert torch.equal(gradients(config, mode, **options), expected), mode


@pytest.mark.parametrize("mode", ["gelu", "selective", "block"])
def test_one_graph_has_the_same_bits(mode):
    options = {"dtype": torch.bfloat16, "cu_seqlens": DOCUMENTS}
    assert torch.equal(
        gradients(SMALL, mode, compiled=True, **options), gradients(SMALL, "none", **options)
    )


@pytest.mark.parametrize(
    ("mode", "times"), [("none", 1), ("gelu", 1), ("selective", 1), ("block", 2)]
)
def test_attention_is_computed_again_only_with_the_whole_block(mode, times):
    calls = Counter()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls[function._opname] += 1
            return function(*args, **kwargs or {})

    model, tokens = GPT(SMALL, recompute=mode), torch.randint(50, (2, 16))
    with Calls():
        model(tokens, tokens).backward()
    # Ours, and what a CPU has in their place.
    attention = (
        calls["causal_attention_qkvpacked_fwd"]
        + calls["_scaled_dot_product_flash_attention_for_cpu"]
    )
    assert attention == times * SMALL.n_layer
    assert (
        calls["gelu_mlp_fwd"] + calls["gelu"]
        == (2 if mode in ("selective", "block") else 1) * SMALL.n_layer
    )


def test_samples_are_the_same():
    tokens, samples = torch.randint(50, (1, 4)), []
    for mode in RECOMPUTATIONS:
        torch.manual_seed(0)
        samples.append(GPT(SMALL, recompute=mode).generate(tokens, 4, temperature=0))
    assert all(torch.equal(sample, samples[0]) for sample in samples)


def test_what_there_is_not_is_refused():
    with pytest.raises(
        ValueError, match="recompute: expected none, gelu, selective, block, got 'all'"
    ):
        GPT(SMALL, recompute="all")
    with pytest.raises(
        ValueError, match="gelu needs an MLP with gelu, got 'swiglu'; use none, selective, block"
    ):
        check_recompute("gelu", LLAMA)
