import pytest
import torch

from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.tile import tanh
from tritium.kernels.core.triton import HAS_TRITON, tl, triton


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tanh(tl.load(x_ptr + offs)))


def test_tanh_is_float32_accurate_everywhere(device):
    if not (HAS_TRITON and (INTERPRET or device.type == "cuda")):
        pytest.skip("runs a kernel: needs CUDA or TRITON_INTERPRET=1")
    size = torch.cat(
        [
            torch.linspace(0, 12, 2**12 - 8),
            torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.25, 100.0, 1e4, torch.inf]),
        ]
    )
    x = torch.cat([size, -size]).to(device)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, BLOCK=len(x))
    truth = torch.tanh(x.double())
    # Four roundings of half a unit or more: the exponential (two units on a GPU), 1 - e, 1 + e, and
    # their quotient.
    assert ((y.double() - truth).abs() <= 4 * torch.finfo(torch.float32).eps * truth.abs()).all()
