"""Rows per chunk of linear_cross_entropy: how many rows of logits exist at once.

A matmul computes its output in tiles of 128 x 256 elements, `sms` tiles at a time: a wave. The last
wave takes as long as a full one. For a chunk of R rows:

    logits  (R, V)   thousands of tiles: the last wave hardly matters
    dw      (V, D)   the same number of tiles for any R
    dx      (R, D)   ceil(R / 128) ceil(D / 256) tiles, a few waves at most: R must fill them

Whole waves of dx on 132 multiprocessors (H100, H200):

    D       column tiles    rows              tiles         of whole waves
    768     3               44 x 128 = 5632   44 x 3 = 132  132 / 132
                            32 x 128 = 4096   32 x 3 =  96   96 / 132 = 73 %
    1024    4               33 x 128 = 4224   33 x 4 = 132  132 / 132
    1280    5               26 x 128 = 3328   26 x 5 = 130  130 / 132 = 98 %
    1600    7               37 x 128 = 4736   37 x 7 = 259  259 / 264 = 98 %

Estimates: cuBLAS may choose other tiles, or divide the sum over V among programs.
"""

import functools

from ..core.triton import cdiv

# A chunk has at most MAX_CHUNK_ROWS rows, or as many as have MIN_CHUNK_ELEMENTS logits if that is
# more. A chunk reads and writes dw once. Estimates for 4,096 rows, V = 50,304 and D = 768 in
# bfloat16 on an H200: matmuls 1.3 ms, dw 0.07 ms.
MAX_CHUNK_ROWS, MIN_CHUNK_ELEMENTS = 5_632, 1 << 26
# Tile of the matmuls. All chunks but the last have a multiple of TILE_ROWS rows.
TILE_ROWS, TILE_COLUMNS = 128, 256
# Rows of logits start at multiples of this many elements: GEMMs need it to run at full speed.
LOGITS_MULTIPLE = 64
# Logits per block of the reference, and fewest rows. Each block reads and writes dw, and matmuls of
# few rows are slow. On two cores of an AMD EPYC with AVX2 the recipe laptop (V = 4,096) made 0.89
# to 0.90 times nanoGPT's steps per second with blocks of 256 rows, and 0.97 to 0.99 times with
# blocks of 1,024 (bench/results/steps-cpu). With V = 50,304, blocks of 20 rows are 1.4 x slower
# than blocks of 256.
BLOCK_LOGITS = 1 << 22
MIN_BLOCK_ROWS = 256


@functools.lru_cache
def plan(N: int, V: int, D: int, sms: int) -> int:
    """Choose the rows per chunk for N rows of D elements and V logits on `sms` multiprocessors.

    The choice has the fewest waves of dx over all chunks. Among equals it has the fewest chunks.
    Among these it has the fewest rows, so that all chunks have nearly equal sizes.
    """
    columns = cdiv(D, TILE_COLUMNS)
    tiles = max(1, cdiv(N, TILE_ROWS))
    most = max(MAX_CHUNK_ROWS, MIN_CHUNK_ELEMENTS // row_stride(V)) // TILE_ROWS

    def waves(chunk: int) -> int:
        chunks, last = divmod(tiles, chunk)
        return chunks * cdiv(chunk * columns, sms) + cdiv(last * columns, sms)

    choices = range(1, min(most, tiles) + 1)
    return TILE_ROWS * min(choices, key=lambda chunk: (waves(chunk), cdiv(tiles, chunk), chunk))


def row_stride(V: int) -> int:
    """Elements between the starts of two rows in a chunk of logits."""
    return cdiv(V, LOGITS_MULTIPLE) * LOGITS_MULTIPLE


def block_rows(N: int, V: int, elements: int = BLOCK_LOGITS, least: int = MIN_BLOCK_ROWS) -> int:
    """Choose how many of N rows of V logits a reference takes at a time.

    Args:
        elements: logits per block at most, unless `least` rows have more.
        least: fewest rows per block.
    """
    return max(1, min(N, max(least, elements // V)))
