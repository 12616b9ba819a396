"""Launch sizes of the loss kernels, and the layout of the gradients that they write."""

import itertools

import pytest
import torch

from tritium.kernels.loss.launch import ROWS_IN_FLIGHT_BYTES, empty_gradient, plan

pytestmark = pytest.mark.plain


def test_tiles_fill_a_program_and_are_powers_of_two():
    sizes = (1, 3, 16, 65, 511, 512, 1023, 1024, 2047, 4096, 50_257, 10**6)
    for itemsize, V, architecture in itertools.product((2, 4), sizes, ("sm_80", "sm_90", "gfx942")):
        tile = plan(V, itemsize, architecture)
        assert tile.vec * itemsize == 16
        assert all(size & (size - 1) == 0 for size in (tile.block_m, tile.unroll, tile.block_v))
        assert tile.block_m == 1 or tile.block_v >= V, "rows that share a program fit in one tile"
        assert tile.unroll * tile.block_v <= max(2 * V, 16)
        assert 2 * V >= 1024 or tile.block_m * tile.block_v >= 1024


@pytest.mark.parametrize(
    ("V", "itemsize", "lanes"),
    [(4_096, 2, 128), (16_384, 2, 128), (32_768, 2, 512), (50_304, 2, 512), (50_304, 4, 512)],
)
def test_rows_in_flight_of_the_in_place_kernel_fit_the_l2_cache(V, itemsize, lanes):
    """With 128 lanes, 5 programs per multiprocessor hold 66 MB of rows if V is 50,304."""
    tile = plan(V, itemsize, "sm_90", sms=132)
    assert tile.lanes == lanes
    programs = {(128, 4): 5, (512, 2): 2, (512, 4): 1}[lanes, tile.unroll]
    assert programs * 132 * V * itemsize <= ROWS_IN_FLIGHT_BYTES["sm_"]
    assert plan(V, itemsize, "sm_90").lanes == 128, "other kernels read each row once"


def test_rows_of_the_gradient_are_aligned_as_those_of_the_logits():
    """At the same distance from a multiple of 16 bytes: kernels load and store 16 bytes at once."""
    base = torch.empty(6, 40, dtype=torch.bfloat16)
    for V, logits in (
        (40, base),
        (33, base[:, :33]),
        (40, base[::2]),
        (33, torch.empty(6, 33)),
        (9, base[:1, :9].expand(6, 9)),
    ):
        gradient = empty_gradient(logits)
        assert gradient.shape == logits.shape
        assert gradient.dtype == logits.dtype
        assert V <= gradient.stride(0) < V + 16 // logits.itemsize
        assert (gradient.stride(0) - logits.stride(0)) * logits.itemsize % 16 == 0
