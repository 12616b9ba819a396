"""The second stage of the sums over rows. Each operator tests the first stage with its kernels."""

import pytest
import torch

from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.partial_sums import PARTIALS_PER_STEP, empty_partials, sum_partials

NEEDS_KERNELS = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()),
    reason="runs a kernel: needs CUDA or TRITON_INTERPRET=1",
)


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "N"), [(0, 3), (1, 1), (3, 33), (PARTIALS_PER_STEP + 1, 70)])
def test_sum_partials_sums_rows(P, N, dtype, device):
    shapes = (P, N), (P + 2, 2 * N), (2 * P, N + 1)
    partials = [torch.randn(shape, device=device) for shape in shapes]
    a, b, c = (
        torch.empty(partial.shape[1], dtype=each, device=device)
        for partial, each in zip(partials, (dtype, torch.float32, dtype), strict=True)
    )
    sum_partials(partials[0], a, partials[1], b, partials[2], c)
    for got, partial in zip((a, b, c), partials, strict=True):
        torch.testing.assert_close(got, partial.sum(0).to(got.dtype))
        alone = torch.empty_like(got)
        sum_partials(partial, alone)
        assert torch.equal(got, alone)


@NEEDS_KERNELS
def test_sum_partials_skips_a_pair_without_partials(device):
    a, c = (torch.randn(3, 33, device=device) for _ in range(2))
    first, empty, third = (torch.empty(N, device=device) for N in (33, 0, 33))
    sum_partials(a, first, None, empty, c, third)
    torch.testing.assert_close(first, a.sum(0))
    torch.testing.assert_close(third, c.sum(0))


@pytest.mark.plain
def test_empty_partials_are_float32_rows():
    partials = empty_partials(5, torch.empty(2, 7, dtype=torch.bfloat16))
    assert partials.shape == (5, 7)
    assert partials.dtype == torch.float32
