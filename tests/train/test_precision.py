import pytest
import torch

from tritium.model import GPT, GPTConfig
from tritium.train.config import InputError
from tritium.train.precision import choose_dtype, computing, products, refresh, working_copy

pytestmark = pytest.mark.plain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS = torch.arange(32).view(4, 8) % 20


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
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose_dtype("auto", CUDA) == torch.float16
    with pytest.raises(InputError, match="expected float16 or float32 on this GPU, which has no bfloat16"):
        choose_dtype("bfloat16", CUDA)


def test_only_linear_maps_are_narrow(model):
    copy = working_copy(model, torch.bfloat16)
    for (name, mine), (same, wide) in zip(copy.named_parameters(), model.named_parameters(), strict=True):
        assert name == same
        assert wide.dtype == torch.float32
        if ".attn." in name or ".mlp." in name:
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine, wide.bfloat16())
        else:
            assert mine is wide
    assert working_copy(model, torch.float32) is model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_bitwise_those_of_autocast(model, dtype):
    """Also summed over micro-batches, and after the weights have changed."""
    copy = working_copy(model, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    refresh(copy, model)
    results = []
    for network, context in ((copy, computing(copy)), (model, torch.autocast("cpu", dtype))):
        model.zero_grad()
        with context:
            losses = [network(rows, rows.flip(1)) for rows in TOKENS.split(2)]
        for loss in losses:
            loss.backward()
        results.append((losses, [parameter.grad for parameter in model.parameters()]))
    assert [loss.item() for loss in results[0][0]] == [loss.item() for loss in results[1][0]]
    for mine, autocasts in zip(results[0][1], results[1][1], strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, autocasts)
    assert all(parameter.grad is None for parameter in products(copy)), "each sum is kept once"


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
    with computing(copy):
        copy(TOKENS, TOKENS).backward()
    assert model.h[0].mlp.c_fc.weight.grad is None
    assert model.h[1].mlp.c_fc.weight.grad is not None


def test_a_copy_samples_what_autocast_would(model):
    copy = working_copy(model, torch.bfloat16)
    with computing(copy):
        mine = copy.generate(TOKENS[:1, :3], 4, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mine, model.generate(TOKENS[:1, :3], 4, temperature=0))
