"""Sums over rows in two stages; what writes the first is tested with its operators."""

import pytest
import torch

from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.partial_sums import PARTIALS_PER_STEP, empty_partials, sum_partials


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()),
    reason="a kernel alone: needs CUDA or TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "N"), [(0, 3), (1, 1), (3, 33), (PARTIALS_PER_STEP + 1, 70)])
def test_partial_sums_are_added_up(P, N, dtype, device):
    a, b = (torch.randn(P, N, device=device) for _ in range(2))
    one, two, alone = (torch.empty(N, dtype=dtype, device=device) for _ in range(3))
    sum_partials(a, one, b, two)
    sum_partials(a, alone)
    assert torch.equal(one, alone)
    for got, partial in ((one, a), (two, b)):
        torch.testing.assert_close(got, partial.sum(0).to(dtype))


@pytest.mark.plain
def test_room_for_partial_sums():
    room = empty_partials(5, torch.empty(2, 7, dtype=torch.bfloat16))
    assert room.shape == (5, 7)
    assert room.dtype == torch.float32
