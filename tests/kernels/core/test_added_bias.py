import pytest
import torch

from tritium.kernels.core.added_bias import attach, column_sums

pytestmark = pytest.mark.plain


def test_the_gradient_goes_to_x_and_its_sum_to_the_bias():
    x = torch.randn(2, 3, 4, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    dy = torch.randn(2, 3, 4)
    y = attach(x, bias)
    assert torch.equal(y, x)
    y.backward(dy)
    assert torch.equal(x.grad, dy)
    assert torch.equal(bias.grad, dy.flatten(0, 1).sum(0))


def test_only_inputs_that_need_a_gradient_get_one():
    x, bias = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    attach(x, bias).backward(torch.ones(3, 4))
    assert x.grad is None
    assert torch.equal(bias.grad, torch.full((4,), 3.0))
    assert attach(x, None) is x


def test_16_bit_gradients_are_summed_in_float32():
    dx = torch.ones(1000, 2, dtype=torch.bfloat16)
    dx[0] = 2.0**-6  # lost in a sum in bfloat16
    assert column_sums(dx, torch.float32).tolist() == [999 + 2.0**-6] * 2
    assert column_sums(dx, None).numel() == 0


def total(x, bias, factors):
    return (attach(x, bias) * factors).sum()


def test_torch_func_gives_the_gradient_of_the_bias():
    x, bias, factors = torch.randn(2, 5, 4), torch.randn(4), torch.randn(5, 4)
    gradient = torch.func.grad(total, (0, 1))
    for function in (gradient, torch.compile(gradient, fullgraph=True, backend="aot_eager")):
        dx, dbias = function(x[0], bias, factors)
        assert torch.equal(dx, factors)
        torch.testing.assert_close(dbias, factors.sum(0))
    for bias_axis in (0, None):
        biases = bias if bias_axis is None else torch.stack([bias, bias])
        dx, dbias = torch.func.vmap(gradient, (0, bias_axis, None))(x, biases, factors)
        assert torch.equal(dx, torch.stack([factors] * 2))
        torch.testing.assert_close(dbias, factors.sum(0).expand(2, 4))


def test_torch_func_gives_a_16_bit_bias_a_gradient_that_is_summed_in_float32():
    factors = torch.ones(1000, 2)
    bias = torch.zeros(2, dtype=torch.bfloat16)
    assert attach(factors, bias).dtype == torch.float32
    dbias = torch.func.grad(total, 1)(torch.ones(1000, 2), bias, factors)
    assert dbias.tolist() == [1000, 1000]
    assert dbias.dtype == torch.bfloat16
