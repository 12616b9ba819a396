import numpy as np
import pytest
import torch

from tritium.kernels._op import INTERPRET
from tritium.kernels._philox import random_bits
from tritium.kernels._triton import HAS_TRITON, tl, triton


@triton.jit
def _randint_kernel(counter_ptr, bits_ptr, seed, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(bits_ptr + offs, tl.randint(seed, tl.load(counter_ptr + offs)))


def test_bits_are_those_of_triton(device):
    if not (HAS_TRITON and (INTERPRET or device.type == "cuda")):
        pytest.skip("runs a kernel: needs CUDA or TRITON_INTERPRET=1")
    counter = torch.tensor([0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 123_456_789_012], device=device)
    for seed in (0, 1, 2**31 + 5, 2**61 + 12345):
        bits = torch.empty(8, dtype=torch.int32, device=device)
        _randint_kernel[(1,)](counter, bits, seed, BLOCK=8)
        expected = torch.from_numpy(random_bits(torch.tensor(seed), counter.cpu()).numpy().astype(np.uint32).view(np.int32))
        assert torch.equal(bits.cpu(), expected)


@pytest.mark.plain
def test_bits_are_spread_evenly():
    bits = random_bits(torch.tensor(7), torch.arange(100_000))
    assert bits.min() >= 0
    assert bits.max() < 2**32
    # A share of n fair draws is off by more than 5 / (2 sqrt(n)) once in two million tries.
    for bit in range(32):
        assert abs(((bits >> bit) & 1).double().mean() - 0.5) < 2.5 / 100_000**0.5
