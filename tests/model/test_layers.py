"""Each row of the tables of layers builds a model, and describes the module that it builds."""

import pytest
import torch

from tests.held import Held
from tritium.model import GPT, GPTConfig
from tritium.model.choices import MLPS, NORMS, POSITIONS
from tritium.model.cost import parameters
from tritium.model.layers import Branch, Linear

pytestmark = pytest.mark.plain

SMALL = {
    "n_layer": 1,
    "n_head": 4,
    "n_kv_head": 2,
    "d_model": 32,
    "vocab_size": 90,
    "context_tokens": 12,
}
TOKENS = 10


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_combination_of_rows_trains_and_has_the_parameters_of_the_formula(
    norm, position, mlp, bias
):
    config = GPTConfig(**SMALL, norm=norm, position=position, mlp=mlp, bias=bias)
    torch.manual_seed(0)
    model = GPT(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.d_model
    assert count(model) - padding == parameters(config)

    tokens = torch.randint(config.vocab_size, (2, TOKENS))
    model(tokens, tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# --- norms


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", NORMS)
def test_norm_has_a_bias_if_its_row_and_the_config_say_so(name, bias):
    row = NORMS[name]
    config = GPTConfig(**SMALL, norm=name, bias=bias)
    vectors = 2 if row.has_bias and bias else 1
    assert count(row.module(config)) == vectors * config.d_model


@pytest.mark.parametrize("name", NORMS)
def test_norm_keeps_the_statistics_of_its_row(name):
    """In bfloat16. In float32 on a CPU, autograd keeps x - mean in place of x."""
    row = NORMS[name]
    config = GPTConfig(**SMALL, norm=name)
    norm = row.module(config).bfloat16()
    stream = torch.randn(TOKENS, config.d_model, dtype=torch.bfloat16, requires_grad=True)
    with Held(stream, *norm.parameters()) as held:
        y, _ = norm(None, stream)
    assert held.now - y.nbytes == 4 * row.statistics * TOKENS


@pytest.mark.parametrize("name", NORMS)
def test_norm_adds_the_branch_to_the_stream_first(name):
    config = GPTConfig(**SMALL, norm=name)
    norm = NORMS[name].module(config)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    branch = torch.randn(TOKENS, config.d_model)
    stream = torch.randn(TOKENS, config.d_model)
    y, total = norm(Branch(branch, None), stream)
    expected, same = norm(None, branch + stream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(total, branch + stream)
    torch.testing.assert_close(same, branch + stream, rtol=0, atol=0)


@pytest.mark.parametrize("name", NORMS)
def test_bias_of_a_branch_gets_its_gradient_from_the_norm(name):
    config = GPTConfig(**SMALL, norm=name)
    norm = NORMS[name].module(config)
    layer = Linear(8, config.d_model, bias=True)
    for parameter in (*norm.parameters(), *layer.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(TOKENS, 8)
    stream = torch.randn(TOKENS, config.d_model)
    branch = layer.branch(x)
    assert torch.equal(branch.y, layer(x))
    assert torch.autograd.grad(branch.y.sum(), layer.bias, allow_unused=True) == (None,)

    found, expected = (
        torch.autograd.grad(norm(each, stream)[0].square().sum(), layer.bias)[0]
        for each in (layer.branch(x), Branch(layer(x), None))
    )
    torch.testing.assert_close(found, expected)


# --- MLPs


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", MLPS)
def test_mlp_has_the_matrices_and_biases_of_its_row(name, bias):
    row = MLPS[name]
    config = GPTConfig(**SMALL, mlp=name, bias=bias)
    D = config.d_model
    F = config.d_feedforward
    biases = F + D if row.has_bias and bias else 0
    assert row.width(D) == F
    assert count(row.module(config)) == row.matrices * D * F + biases


@pytest.mark.parametrize("name", MLPS)
def test_mlp_keeps_two_hidden_tensors(name):
    config = GPTConfig(**SMALL, mlp=name)
    mlp = MLPS[name].module(config)
    x = torch.randn(TOKENS, config.d_model, requires_grad=True)
    with Held(x, *mlp.parameters()) as held:
        y, _ = mlp(x)
    assert held.now - y.nbytes == 2 * 4 * TOKENS * config.d_feedforward
