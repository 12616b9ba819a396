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
