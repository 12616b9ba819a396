import pytest
import torch

from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.philox import random_bits
from tritium.kernels.core.triton import HAS_TRITON, tl, triton


@triton.jit
def _randint_kernel(counter_ptr, bits_ptr, seed, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = tl.randint4x(seed, tl.load(counter_ptr + offs))
    tl.store(bits_ptr + 4 * offs, w0.to(tl.int32, bitcast=True))
    tl.store(bits_ptr + 4 * offs + 1, w1.to(tl.int32, bitcast=True))
    tl.store(bits_ptr + 4 * offs + 2, w2.to(tl.int32, bitcast=True))
    tl.store(bits_ptr + 4 * offs + 3, w3.to(tl.int32, bitcast=True))


def test_bits_equal_those_of_triton(device):
    if not (HAS_TRITON and (INTERPRET or device.type == "cuda")):
        pytest.skip("runs a kernel: needs CUDA or TRITON_INTERPRET=1")
    counter = torch.tensor(
        [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 123_456_789_012], device=device
    )
    for seed in (0, 1, 2**31 + 5, 2**61 + 12345):
        bits = torch.empty(8, 4, dtype=torch.int32, device=device)
        _randint_kernel[(1,)](counter, bits, seed, BLOCK=8)
        assert torch.equal(
            bits.cpu().long(),
            random_bits(torch.tensor(seed), 4 * counter.cpu()[:, None] + torch.arange(4)),
        )


@pytest.mark.plain
def test_bits_are_spread_evenly():
    bits = random_bits(torch.tensor(7), torch.arange(100_000))
    assert bits.min() >= -(2**31)
    assert bits.max() < 2**31
    # The mean of n fair bits has a standard deviation of 0.5 / sqrt(n). Allow five of them.
    for bit in range(32):
        assert abs(((bits >> bit) & 1).double().mean() - 0.5) < 2.5 / 100_000**0.5
