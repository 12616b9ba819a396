import sys
from dataclasses import replace

import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.precision import choose_dtype, linear_parameters, refresh, working_copy

pytestmark = pytest.mark.plain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS = torch.arange(32).view(4, 8) % 20
LLAMA = {"position": "rotary", "norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": True}


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=20, context_tokens=8))


def test_auto_takes_16_bits_on_gpus_only(monkeypatch):
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto", CUDA) == choose_dtype("bfloat16", CUDA) == torch.bfloat16
    assert choose_dtype("float32", CUDA) == torch.float32
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    assert choose_dtype("auto", CUDA) == torch.float16
    with pytest.raises(
        InputError, match="expected float16 or float32 on this GPU, which has no bfloat16"
    ):
        choose_dtype("bfloat16", CUDA)


def test_only_linear_layers_of_blocks_are_cast(model):
    model = GPT(replace(model.config, tied_head=False))
    copy = working_copy(model, torch.bfloat16)
    for (name, mine), (same, wide) in zip(
        copy.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == same
        assert wide.dtype == torch.float32
        if ".attn." in name or ".mlp." in name:
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine, wide.bfloat16())
        else:
            assert mine is wide
    assert working_copy(model, torch.float32) is model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, LLAMA],
    ids=["gpt2", "llama"],
)
def test_loss_and_gradients_match_float32_to_rounding(dtype, options):
    """Values are rounded about 11 times per block, and twice as often in the backward."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=20, context_tokens=8, **options)
    )
    copy = working_copy(model, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    refresh(copy, model)
    results = []
    for network in (copy, model):
        model.zero_grad()
        loss = network(TOKENS, TOKENS.flip(1))
        loss.backward()
        results.append(
            (loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        )
    assert results[0][1].dtype == torch.float32
    rounding = (4 * 11 * 2) ** 0.5 * torch.finfo(dtype).eps / 2
    assert abs(results[0][0] - results[1][0]) <= rounding * results[1][0]
    assert (results[0][1] - results[1][1]).norm() <= 3**0.5 * rounding * results[1][1].norm()
    # Only the masters keep gradients.
    assert all(parameter.grad is None for parameter in linear_parameters(copy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_compute_in_the_dtype_of_the_copy(model, dtype):
    copy, seen = working_copy(model, dtype), []
    for block in copy.h:
        block.register_forward_hook(
            lambda module, inputs, outputs: seen.extend([*outputs[0], outputs[1], inputs[1]])
        )
    logits = copy(TOKENS)
    assert {value.dtype for value in (*seen, logits)} == {dtype}
    assert copy(TOKENS, TOKENS).dtype == torch.float32


def test_many_micro_batches_are_summed_in_float32():
    """A bfloat16 sum of ones would stop at 256."""
    linear = torch.nn.Linear(1, 1, bias=False)
    copy = working_copy(linear, torch.bfloat16)
    for _ in range(300):
        copy(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert linear.weight.grad.item() == 300


def test_frozen_weights_get_no_gradient(model):
    model.h[0].mlp.c_fc.weight.requires_grad_(False)
    copy = working_copy(model, torch.bfloat16)
    copy(TOKENS, TOKENS).backward()
    assert model.h[0].mlp.c_fc.weight.grad is None
    assert model.h[1].mlp.c_fc.weight.grad is not None


@pytest.mark.parametrize("is_operator", [False, True])
def test_gradient_of_the_shared_weight_is_not_rounded_to_16_bits(model, is_operator, monkeypatch):
    """Neither are its two parts, from the embedding and from the head."""
    embedding = sys.modules["tritium.kernels.embedding"]
    monkeypatch.setattr(embedding._fwd, "_composite_if", lambda *_: not is_operator)
    copy = working_copy(model, torch.bfloat16)
    copy(TOKENS, TOKENS.flip(1)).backward()
    gradient = model.wte.weight.grad
    assert gradient.dtype == torch.float32
    is_rounded = gradient[:20] == gradient[:20].bfloat16().float()
    assert is_rounded.float().mean() < 0.1
