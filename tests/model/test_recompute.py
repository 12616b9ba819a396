"""Activation checkpointing does not change one bit of losses and gradients.

Mode gelu adds weight gradients in chunks of rows, so it has the same bits only if the rows fit into
one chunk. They do here.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.model import GPT, GPTConfig
from tritium.model.choices import RECOMPUTATIONS
from tritium.train.precision import working_copy

pytestmark = pytest.mark.plain

SMALL = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=50, context_tokens=16)
LLAMA = replace(SMALL, position="rotary", norm="rms", mlp="swiglu", bias=False)
DOCUMENTS = torch.tensor([0, 5, 16, 25, 32], dtype=torch.int32)
CHECKPOINTING = [mode for mode in RECOMPUTATIONS if mode != "none"]


def loss_and_gradients(
    config: GPTConfig,
    mode: str,
    *,
    attention: str = "tritium",
    dtype: torch.dtype = torch.float32,
    cu_seqlens: torch.Tensor | None = None,
    compiles: bool = False,
) -> torch.Tensor:
    """Return the loss and all gradients of a training step, as one vector."""
    torch.manual_seed(0)
    model = GPT(config, attention=attention, recompute=mode)
    network = working_copy(model, dtype)
    if compiles:
        torch._dynamo.reset()
        network = torch.compile(network, fullgraph=True, backend="aot_eager")
    tokens, targets = torch.randint(50, (2, 2, 16))
    loss = network(tokens, targets, cu_seqlens=cu_seqlens)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    return torch.cat([loss.detach()[None], *gradients])


@pytest.mark.parametrize("attention", ["tritium", "sdpa"])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_recomputation_gives_the_same_bits(config, dtype, cu_seqlens, attention):
    options = {"dtype": dtype, "cu_seqlens": cu_seqlens, "attention": attention}
    expected = loss_and_gradients(config, "none", **options)
    assert expected.isfinite().all()
    for mode in CHECKPOINTING:
        if RECOMPUTATIONS[mode].fits(config):
            assert torch.equal(loss_and_gradients(config, mode, **options), expected), mode


@pytest.mark.slow
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_compiled_recomputation_gives_the_same_bits(mode):
    options = {"dtype": torch.bfloat16, "cu_seqlens": DOCUMENTS}
    expected = loss_and_gradients(SMALL, "none", **options)
    assert torch.equal(loss_and_gradients(SMALL, mode, compiles=True, **options), expected)


@pytest.mark.parametrize("mode", RECOMPUTATIONS)
def test_backward_runs_attention_and_matmuls_as_often_as_the_row_says(mode):
    calls = Counter()

    class CountCalls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls[function._opname] += 1
            return function(*args, **kwargs or {})

    model = GPT(SMALL, recompute=mode)
    tokens = torch.randint(50, (2, 16))
    with CountCalls():
        model(tokens, tokens).backward()

    # Each sum counts the operator and the PyTorch operator that CPUs run instead.
    attention = (
        calls["causal_attention_qkvpacked_fwd"]
        + calls["_scaled_dot_product_flash_attention_for_cpu"]
    )
    mlp = calls["gelu_mlp_fwd"] + calls["gelu"]
    row = RECOMPUTATIONS[mode]
    assert attention == SMALL.n_layer * (1 + row.extra_attention_forwards)
    assert mlp == SMALL.n_layer * (1 + row.extra_matmul_forwards)


def test_recomputation_does_not_change_generation():
    tokens = torch.randint(50, (1, 4))
    samples = []
    for mode in RECOMPUTATIONS:
        torch.manual_seed(0)
        samples.append(GPT(SMALL, recompute=mode).generate(tokens, 4, temperature=0))
    for sample in samples:
        assert torch.equal(sample, samples[0])


def test_unknown_mode_raises():
    with pytest.raises(ValueError, match="recompute: unknown mode 'blok'; did you mean 'block'"):
        GPT(SMALL, recompute="blok")
