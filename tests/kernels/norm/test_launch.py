"""Launch sizes of the kernels that layer_norm and rms_norm share."""

import pytest

from tritium.kernels.norm.launch import (
    MAX_RESIDENT_WIDTH,
    TILE_ELEMENTS,
    WIDE_BLOCK_N,
    norm_cost,
    plan,
)

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("M", [1, 2, 3, 100, 4096, 10**7])
def test_tiles_cover_each_row_with_a_bounded_number_of_elements(M):
    for N in (1, 2, 15, 16, 17, 768, 1600, MAX_RESIDENT_WIDTH):
        p = plan(M, N)
        assert not p.is_wide
        assert p.block_n >= N
        assert p.block_m == 1 or p.block_m * p.block_n <= TILE_ELEMENTS
    for N in (MAX_RESIDENT_WIDTH + 1, 65536):
        p = plan(M, N)
        assert p.is_wide
        assert p.tile == {"BLOCK_N": WIDE_BLOCK_N, "num_warps": p.num_warps}


def test_short_rows_share_a_program():
    assert plan(4096, 64).block_m == TILE_ELEMENTS // 64
    assert plan(3, 64).block_m == 4  # no more rows than there are, rounded to a power of two


def test_each_program_of_the_backward_has_rows_to_sum():
    for M in (1, 3, 100, 10**7):
        for N in (1, 768, 65536):
            p = plan(M, N, sms=10)
            assert 1 <= p.partials <= 40
            assert (p.partials - 1) * p.block_m < M
    assert plan(0, 64).partials == 0


def test_norm_cost_counts_flops_per_element():
    cost = norm_cost(10, 4, residual=False, dropout=False, fwd_flops=3, bwd_flops=5)
    assert (cost["fwd_flops"], cost["bwd_flops"]) == (30, 50)
