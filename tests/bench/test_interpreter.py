"""The repairs of Triton's interpreter, which conftest.py applies."""

import pytest
import torch

from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.triton import tl, triton

pytestmark = pytest.mark.skipif(not INTERPRET, reason="runs in Triton's interpreter only")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(c_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


def test_casts_to_bfloat16_round_to_nearest():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = float("nan"), float("inf")
    y = torch.empty(64, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, BLOCK=64)
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dots_of_16_bits_are_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    c = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, c, BLOCK=32)
    torch.testing.assert_close(c, a.float() @ b.float())
