"""Rows per chunk: whole waves of tiles, and bounded memory."""

import itertools

import pytest

from tritium.kernels.core.triton import cdiv
from tritium.kernels.loss.chunks import MAX_CHUNK_ROWS, MIN_BLOCK_ROWS, block_rows, plan

pytestmark = pytest.mark.plain

SMS = 132  # H100 and H200
V = 50_304


def waves(N, D, rows):
    """Return the waves of 128 x 256 tiles in which all chunks compute dx."""
    sizes = [min(rows, N - start) for start in range(0, N, rows)]
    return sum(cdiv(cdiv(size, 128) * cdiv(D, 256), SMS) for size in sizes)


@pytest.mark.parametrize(
    ("D", "rows", "tiles"),
    # tiles of one chunk, of the 132 or 264 that whole waves have
    [(768, 5_632, 132), (1024, 4_224, 132), (1280, 3_328, 130), (1600, 4_736, 259)],
)
def test_chunks_of_many_rows_are_whole_waves(D, rows, tiles):
    # So many rows that the last chunk, which may be smaller, does not matter.
    assert plan(rows * 100, V, D, SMS) == rows
    assert rows // 128 * cdiv(D, 256) == tiles
    assert tiles / (cdiv(tiles, SMS) * SMS) > 0.98


@pytest.mark.parametrize(
    ("D", "N", "rows", "expected"),
    [
        (768, 16_384, 5_504, 3),
        (768, 65_536, 5_504, 12),
        (1024, 16_384, 4_096, 4),
        (1024, 65_536, 4_096, 16),
        (1280, 65_536, 3_328, 20),
        (1600, 16_384, 4_736, 7),
        (1600, 65_536, 4_736, 28),
    ],
)
def test_batches_take_the_fewest_waves(D, N, rows, expected):
    """One chunk of all rows would need as many."""
    assert plan(N, V, D, SMS) == rows
    assert waves(N, D, rows) == expected == cdiv(N // 128 * cdiv(D, 256), SMS)
    assert expected <= waves(N, D, 4_096)


def test_rows_are_bounded_and_fill_tiles():
    for N, columns, D in itertools.product(
        (0, 1, 100, 4_097, 10**6), (1, 65, 4096, V), (1, 64, 768, 4096)
    ):
        rows = plan(N, columns, D, SMS)
        assert rows % 128 == 0
        assert rows <= max(MAX_CHUNK_ROWS, (1 << 26) // columns, 128)
        assert rows < max(N, 1) + 128


def test_chunks_are_equal_if_that_costs_no_wave():
    """With 44 row tiles per chunk, whole waves, the last of 12 chunks would have 28."""
    assert plan(65_536, V, 768, SMS) == 43 * 128
    assert plan(MAX_CHUNK_ROWS + 1, V, 256, SMS) == 2_944, "two chunks of 22.5 tiles"


def test_other_gpus_have_other_waves():
    assert plan(10**6, V, 768, 108) == 36 * 128  # A100


def test_blocks_of_the_reference_are_bounded():
    for N, columns in itertools.product((0, 1, 100, 4_097, 10**7), (1, 65, 4096, V)):
        rows = block_rows(N, columns)
        assert 1 <= rows <= max(N, 1)
        assert rows * columns <= max(1 << 22, MIN_BLOCK_ROWS * columns)
    assert block_rows(10**7, 65) > block_rows(10**7, 4096)
    assert block_rows(10**7, 4096) == 1024
    assert block_rows(10**7, V) == MIN_BLOCK_ROWS
