import re

import pytest
import torch

from tritium.bench.ops import OPERATORS
from tritium.bench.ops.case import Implementation
from tritium.bench.ops.check import find_error
from tritium.kernels import layer_norm

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


def error_of(call, dtype=torch.float32):
    planted = Implementation(name="planted", call=call)
    return find_error(OPERATORS["layer_norm"], planted, (32, 64), dtype, CPU)


def scaled(factor):
    return lambda x, weight, bias: layer_norm(x, weight, bias) * factor


class WrongGradient(torch.autograd.Function):
    """The right output, and a gradient of x without the term of the mean."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return layer_norm(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        xhat = layer_norm(x, torch.ones_like(weight))
        return dy * weight / x.std(-1, correction=0, keepdim=True), (dy * xhat).sum(0), dy.sum(0)


def one_wrong_element(x, weight, bias):
    y = layer_norm(x, weight, bias)
    return y + torch.zeros_like(y).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(0.01))


def raising(x, weight, bias):
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (scaled(1.001), r"output 0 is off by"),
        (WrongGradient.apply, r"dx is off by"),
        (one_wrong_element, r"output 0 is off by 0\.01 at most"),
        (raising, r"RuntimeError: no kernel image$"),
        (
            lambda x, weight, bias: layer_norm(x, weight, bias)[:1],
            r"(output 0 is \(1, 64\), expected|RuntimeError)",
        ),
        (scaled(float("nan")), r"off by nan"),
    ],
)
def test_find_error_says_what_is_wrong(call, why):
    assert re.search(why, error_of(call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "call",
    [lambda x, weight, bias: layer_norm(x, weight, bias, eps=1e-2), scaled(1.01)],
)
def test_half_a_percent_is_an_error_in_sixteen_bits(call, dtype):
    assert "output 0 is off by" in error_of(call, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_find_error_is_none_for_a_correct_implementation(dtype):
    assert error_of(layer_norm, dtype) is None
