"""The second stage of the sums over rows. Each operator tests the first stage with its kernels."""

import pytest
import torch

from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.partial_sums import PARTIALS_PER_STEP, empty_partials, sum_partials


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()),
    reason="runs a kernel: needs CUDA or TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "N"), [(0, 3), (1, 1), (3, 33), (PARTIALS_PER_STEP + 1, 70)])
def test_sum_partials_sums_rows(P, N, dtype, device):
    a, b = (torch.randn(P, N, device=device) for _ in range(2))
    first, second, alone = (torch.empty(N, dtype=dtype, device=device) for _ in range(3))
    sum_partials(a, first, b, second)
    sum_partials(a, alone)
    assert torch.equal(first, alone)
    for got, partial in ((first, a), (second, b)):
        torch.testing.assert_close(got, partial.sum(0).to(dtype))


@pytest.mark.plain
def test_empty_partials_are_float32_rows():
    partials = empty_partials(5, torch.empty(2, 7, dtype=torch.bfloat16))
    assert partials.shape == (5, 7)
    assert partials.dtype == torch.float32
