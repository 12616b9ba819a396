"""The tiles of the attention kernels, by architecture, kernel and head size.

The tiles of sm_9 with a head size up to 64 were timed on an H100 (bench/results/h100), those of
SHORT_TILES on an H200 (bench/results/h200). The others were chosen by the machine code that they
compile to (`tritium bench codegen`): no spilled registers, matrix instructions in every main loop
that do not wait for each other, and matrix units that are busy for as much of the time as possible.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch

from ..core.triton import next_power_of_2


@dataclass(frozen=True)
class Tile:
    """Launch sizes of a kernel: queries and keys of a tile, warps of a program, tiles in flight.

    max_registers: registers per thread at most; None: as many as ptxas likes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def arguments(self, head_size: int) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "HEAD": head_size,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": padded(head_size),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **({} if self.max_registers is None else {"maxnreg": self.max_registers}),
        }


def _tiles(**kernels: dict[int, tuple[int, ...]]) -> dict[str, dict[int, Tile]]:
    """Rows of sizes, in the order of Tile's fields, by kernel and head size."""
    return {
        kernel: {size: Tile(*row) for size, row in rows.items()} for kernel, rows in kernels.items()
    }


# By the start of the architecture's name, by kernel, and by the largest padded head size of a row.
# Except at head size 64 on sm_9, a program owns 128 rows where it can: it then reads half as much
# through the L2 cache as one that owns 64. The side that it loops over is as wide as registers
# allow.
TILES = {
    "sm_9": _tiles(
        # Head size 64: three small programs per multiprocessor hide each other's waiting better
        # than one large program. Backward of 64 x 1,024 tokens, 12 heads, on an H100 (November
        # 2026): 1.20 ms with dkdv (64, 128, 8, 2), 1.01 ms with (64, 64, 4, 2). The latter takes
        # 169 registers, so two programs fit. Limited to 168 registers three fit: 0.92 ms, although
        # ptxas then lets each matrix instruction wait for the one before.
        fwd={64: (64, 128, 4, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
        dq={64: (64, 64, 4, 2), 128: (128, 128, 8, 2), 256: (64, 32, 8, 2)},
        dkdv={64: (64, 64, 4, 2, 168), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
        # At head size 128 every tile that was tried spills.
        one_pass={64: (64, 128, 8, 2)},
    ),
    "sm_10": _tiles(
        fwd={64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
        dq={64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        # At head size 256 two accumulators of 64 rows fill the tensor memory, and the third loop of
        # a window exceeds it.
        dkdv={64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 32, 8, 1)},
    ),
    # sm_12 and sm_ (8.x) stay within 99 KB of shared memory, what a program has on consumer GPUs.
    "sm_12": _tiles(
        fwd={64: (128, 32, 4, 3), 128: (128, 32, 4, 2), 256: (64, 32, 8, 2)},
        dq={64: (128, 32, 4, 3), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
        dkdv={64: (32, 128, 8, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
    ),
    "sm_": _tiles(
        fwd={64: (128, 32, 4, 3), 128: (128, 32, 4, 2), 256: (64, 32, 8, 2)},
        dq={64: (128, 32, 4, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        dkdv={64: (32, 128, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
    ),
    "gfx": _tiles(
        fwd={64: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)},
        dq={64: (128, 64, 4, 1), 128: (64, 32, 4, 1), 256: (64, 16, 4, 1)},
        dkdv={64: (32, 128, 4, 1), 128: (32, 64, 4, 1), 256: (16, 64, 4, 1)},
    ),
}
# Rows that replace those of TILES where these would spill, by family, kernel and padded head size.
# The first row is for one option, the second for two, the last one also for more. A narrower tile
# reads more shared memory per FLOP.
OPTION_TILES = {
    "sm_9": {
        ("dq", 128): (Tile(128, 64, 8, 3),),
        ("dkdv", 64): (*3 * (Tile(64, 64, 4, 2),), Tile(32, 64, 4, 2)),
        ("dkdv", 128): (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
    }
}
# Rows that replace those of TILES for at most SHORT_KEYS keys without options. Forward of 65,536
# tokens with 12 heads on an H200 (November 2026): 330 us instead of 349 at 1,024 keys, but 567
# instead of 561 at 2,048.
SHORT_TILES = {"sm_9": {("fwd", 64): Tile(64, 64, 4, 2)}}
SHORT_KEYS = 1_024
# float32 matmuls do not use the matrix units: they are not rounded to TF32, and their operands are
# in registers.
FLOAT32_TILES = _tiles(
    fwd={64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
    dq={64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
    dkdv={64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
    one_pass={64: (32, 32, 8, 2)},
)
# The backward in one pass has one program per multiprocessor, and a program works on one head at a
# time. With BACKWARD = "auto" it is chosen if the programs need at least ONE_PASS_WAVES waves, if
# the average wave is at least as full as ONE_PASS_FULL, and if the data that they read repeatedly
# stays in the L2 cache. The H100 and the H200 have an L2 cache of 50 MB.
ONE_PASS_WAVES = 1.5
ONE_PASS_FULL = 0.85
ONE_PASS_L2_BYTES = 40 << 20


@functools.cache
def padded(head_size: int) -> int:
    """Columns of a tile: a power of two for Triton, at least 16 for matrix instructions."""
    return max(16, next_power_of_2(head_size))


@functools.lru_cache(maxsize=1024)
def plan(
    kernel: str,
    head_size: int,
    dtype: torch.dtype,
    architecture: str,
    *,
    has_dropout: bool = False,
    options: int = 0,
    is_short: bool = False,
) -> Tile:
    """Choose the tile of a kernel: "fwd", "dq", "dkdv" or "one_pass".

    Args:
        options: how many apply of documents, a window, soft-capping, grouped heads, dropout and the
            gradient of a bias.
        is_short: whether there are at most SHORT_KEYS keys.
    """
    family = next(name for name in TILES if architecture.startswith(name))
    rows = (FLOAT32_TILES if dtype == torch.float32 else TILES[family])[kernel]
    size = min(size for size in rows if size >= padded(head_size))
    tile = rows[size]
    if is_short and not options and dtype != torch.float32:
        tile = SHORT_TILES.get(family, {}).get((kernel, size), tile)
    if options and dtype != torch.float32:
        narrow = OPTION_TILES.get(family, {}).get((kernel, size), (tile,))
        tile = narrow[min(options, len(narrow)) - 1]
    if not has_dropout:
        return tile
    # The random words take as many registers as the scores: halve the side that is looped over.
    looped = "block_m" if kernel == "dkdv" else "block_n"
    return replace(tile, **{looped: max(16, getattr(tile, looped) // 2)})


def has_one_pass_tile(head_size: int, dtype: torch.dtype, architecture: str) -> bool:
    """Whether there is a tile of the one-pass backward."""
    family = next(name for name in TILES if architecture.startswith(name))
    rows = (FLOAT32_TILES if dtype == torch.float32 else TILES[family]).get("one_pass", {})
    return any(size >= padded(head_size) for size in rows)


def one_pass_fits(heads: int, tokens: int, head_size: int, multiprocessors: int) -> bool:
    """Whether the backward in one pass fills the device and its data stays in the L2 cache.

    Args:
        heads: query heads of all sequences.
        tokens: per sequence.
    """
    waves = heads / multiprocessors
    is_full = waves >= ONE_PASS_WAVES and waves / math.ceil(waves) >= ONE_PASS_FULL
    # Queries, do and the float32 sums of dq. On average half of the queries are still needed.
    live_bytes = tokens * padded(head_size) * (2 + 2 + 4) // 2
    return is_full and multiprocessors * live_bytes <= ONE_PASS_L2_BYTES
