import sys
import types

import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.precision import (
    check_attention,
    choose_dtype,
    narrowed,
    refresh,
    working_copy,
)

pytestmark = pytest.mark.plain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS = torch.arange(32).view(4, 8) % 20
LLAMA = {"position": "rotary", "norm": "rms", "mlp": "swiglu", "bias": False}


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=20, context_tokens=8))


def test_auto_takes_the_narrowest_that_the_device_is_good_at(monkeypatch):
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


def test_flash_attn_needs_its_package_a_gpu_and_16_bits(monkeypatch):
    config = TrainConfig.from_options(attention="flash-attn", precision="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(
        InputError,
        match=r"--attention: expected an installed flash-attn, found none; pip install 'tritium\[fl",
    ):
        check_attention(config, CUDA)
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    check_attention(config, CUDA)
    for precision, device in (("bfloat16", CPU), ("float32", CUDA)):
        with pytest.raises(
            InputError,
            match=f"a GPU and 16 bits for flash-attn, got {device} and torch.{precision}; take trit",
        ):
            check_attention(config.with_options(precision=precision), device)
    check_attention(TrainConfig.from_options(attention="sdpa"), CPU)


def test_only_linear_maps_are_narrow(model):
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
    [{}, {"position": "rotary", "norm": "rms", "mlp": "swiglu", "bias": False}],
    ids=["gpt2", "llama"],
)
def test_loss_and_gradients_are_those_of_float32_to_rounding(dtype, options):
    """Also after the weights have changed. A value is rounded about 11 times a block, and as often again in the backward."""
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
    assert all(parameter.grad is None for parameter in products(copy)), "each sum is kept once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_compute_in_the_dtype_of_their_linear_maps(model, dtype):
    copy, seen = working_copy(model, dtype), []
    for block in copy.h:
        block.register_forward_hook(
            lambda module, inputs, outputs: seen.extend([*outputs, inputs[1]])
        )
    logits = copy(TOKENS)
    assert {value.dtype for value in (*seen, logits)} == {dtype}
    assert copy(TOKENS, TOKENS).dtype == torch.float32


def test_many_micro_batches_are_summed_in_float32():
    """In bfloat16 a sum of ones stands still at 256."""
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


def test_weights_cast_in_each_pass_have_their_gradients_before_the_backward_goes_on(model):
    """So that ranks can send them meanwhile; and the same gradients as the working copy's."""
    order, results = [], []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    for network in (working_copy(model, torch.bfloat16), narrowed(model, torch.bfloat16)):
        network(TOKENS, TOKENS.flip(1)).backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        model.zero_grad()
        last, order = order, []
    assert torch.equal(*results)
    assert max(last.index(name) for name in last if "h.1." in name) < min(
        last.index(name) for name in last if "h.0." in name
    )
