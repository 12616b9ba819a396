"""How close to its floor each kind of kernel comes: the assumptions of `tritium bench predict`.

    floor       max(bytes / copy bandwidth, FLOPs / matmul rate), with the rates of LIMITS
    predicted   floor / efficiency + GAP_SECONDS

Rows of EFFICIENCIES that say "measured" are from bench/results/h100/profile.json: gpt2, 32 x 1,024
tokens, on an H100. The others are estimates and state their reason. Replace them by a measurement
of `tritium bench predict --measure`.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import InputError
from ...kernels.core.device import DEFAULT_SM_COUNT
from ...kernels.core.triton import cdiv
from .. import RESULTS
from ..record import read_record
from .step import ATTENTION_MATMULS, Work


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The ceilings of a GPU."""

    bytes_per_second: float
    """Bandwidth of a copy; reads and writes count."""
    flops_per_second: float
    """Rate of an 8192 x 8192 x 8192 matmul in bfloat16, on random data."""


# `tritium bench machine` measures them. An H100 reached 795 TFLOP/s, and 2.43 TB/s with a copy, but
# 3.0 TB/s in the norms of a training step, which find part of their operands in the L2 cache. An
# H200 reached 779 TFLOP/s, and 3.9 TB/s in cross_entropy; 4.3 TB/s are those of a plain copy.
LIMITS = {
    "h100": Limits(bytes_per_second=3.0e12, flops_per_second=780e12),
    "h200": Limits(bytes_per_second=4.3e12, flops_per_second=780e12),
}
# Between two kernels of a stream: the first drains, the second starts.
GAP_SECONDS = 2e-6
# Host time of (a launch of a Triton kernel, an ATen operator). Triton's launch takes 9 to 18 us
# (vLLM pull request 34838, tritonbench 637). An eager custom operator adds Python and autograd.
HOST_SECONDS = {"compiled": (20e-6, 5e-6), "eager": (60e-6, 10e-6)}

# Per multiprocessor and clock on sm_90.
MATRIX_FLOPS = 4096
EXPONENTIALS = 16
WARP_INSTRUCTIONS = 4
L2_BYTES = 50e6
# The file with the machine code that the GPU machine's Triton makes.
GOLDEN_TABLE = RESULTS / "codegen-triton-3.6.0.json"


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """A kind of work, how close to its floor it comes, and why."""

    name: str
    pattern: str
    """Regular expression that the name of the kernel matches."""
    value: float | Callable[[Work, Limits], float]
    reason: str


def floor_seconds(work: Work, limits: Limits) -> float:
    """Return the least time that the ceilings allow."""
    return max(work.nbytes / limits.bytes_per_second, work.flops / limits.flops_per_second)


def efficiency_of(work: Work, limits: Limits) -> tuple[Efficiency, float]:
    """Return the row of EFFICIENCIES for a piece of work, and its efficiency."""
    row = next(row for row in EFFICIENCIES if re.search(row.pattern, work.kernel))
    return row, row.value(work, limits) if callable(row.value) else row.value


# --- matmuls

# (K up to, fraction of the ceiling). Measured for groups of matmuls of a step: 0.83 to 1.0.
_BY_DEPTH = ((1024, 0.88), (2048, 0.93), (4096, 0.97), (float("inf"), 1.0))
# Assumed to be cuBLAS's tile for large matmuls on sm_90.
_TILE_M, _TILE_N = 128, 256


def _cublas(work: Work, _: Limits) -> float:
    M, N, K = work.sizes
    base = next(fraction for depth, fraction in _BY_DEPTH if depth >= K)
    waves = cdiv(M, _TILE_M) * cdiv(N, _TILE_N) / DEFAULT_SM_COUNT
    if waves < 0.7 and K >= 4096:
        base *= 0.85  # K is divided among multiprocessors, and the parts are added: an estimate
    else:
        base *= waves / math.ceil(waves)
    return base * (1 if N % 8 == 0 and K % 8 == 0 else 0.9)


def _fused(work: Work, _: Limits) -> float:
    # As if the epilogue took as long as 256 more columns of K.
    K = work.sizes[2]
    return 0.8 * K / (K + 256)


# --- attention


def _attention(work: Work, limits: Limits) -> float:
    """Estimate from the instructions of a tile.

    A tile takes `matrix` clocks of the matrix units, `exponential` clocks for exp2, and `issue`
    clocks to issue the instructions of its loop. If a multiprocessor runs one program, or if wgmma
    is serialized, nothing overlaps: the sum. If it runs two, the estimate is the middle between the
    sum and the largest. Loads at the start and stores at the end of a program take as long as one
    more tile. The backward in one pass has a program per multiprocessor, which pays this for each
    tile of keys; the last heads may leave multiprocessors idle.

    This gives for causal forwards with tiles of 128 x 128, without serialization: head size 64,
    1,024 tokens: 297 TFLOP/s; 16,384 tokens: 398; head size 128, 16,384 tokens: 385. The paper of
    FlashAttention-3 shows 291, 363 and 378 for Triton's tutorial on an H100.
    """
    sizes = work.launch.arguments
    rows, columns, K = (sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    T, S = sizes["T"], sizes.get("S", sizes["T"])
    scores = rows * columns
    golden = _golden_row(work.kernel, sizes["HEAD"])
    matrix = ATTENTION_MATMULS[work.kernel] * 2 * scores * K / MATRIX_FLOPS
    exponential = scores / EXPONENTIALS
    issue = golden["hottest_loop"]["instructions"] * golden["num_warps"] / WARP_INSTRUCTIONS
    clocks = matrix + exponential + issue
    if golden["blocks_per_sm"] > 1 and not golden["serialized"]:
        clocks = (clocks + max(matrix, exponential, issue)) / 2

    # tiles that the mask does not hide
    heads = sizes["heads"]
    if work.kernel.endswith("one_pass_kernel"):
        heads = cdiv(heads, DEFAULT_SM_COUNT) * DEFAULT_SM_COUNT
    if work.kernel.endswith(("dkdv_kernel", "one_pass_kernel")):
        programs = cdiv(S, columns)
        tiles = sum(cdiv(T, rows) - column * columns // rows for column in range(programs))
    else:
        programs = cdiv(T, rows)
        tiles = sum(cdiv(min(S, (row + 1) * rows), columns) for row in range(programs))
    clocks_per_second = limits.flops_per_second / DEFAULT_SM_COUNT / MATRIX_FLOPS
    total = heads * (tiles + programs) * clocks / DEFAULT_SM_COUNT
    return floor_seconds(work, limits) / (total / clocks_per_second)


@functools.cache
def _golden_rows() -> tuple[dict, ...]:
    return tuple(
        row for row in read_record(GOLDEN_TABLE, "codegen")["rows"] if row["arch"] == "sm_90"
    )


def _golden_row(kernel: str, head_size: int = 0) -> dict:
    """Return the row of the golden table for a kernel: the one with the nearest head size.

    Raises: InputError if the table does not have the kernel.
    """
    rows = [row for row in _golden_rows() if row["kernel"] == kernel]
    if not rows:
        raise InputError(
            f"{GOLDEN_TABLE.name}: expected a row for {kernel}, found none; run `tritium bench "
            "codegen`"
        )

    def distance(row: dict) -> int:
        found = re.search(r"\bK=(\d+)", row["shape"])
        return abs(int(found[1]) - head_size) if found else 0

    return min(rows, key=distance)


# --- memory


def _loss_rows(work: Work, _: Limits) -> float:
    """A program reads its row twice. The second time it comes from the L2 cache if all rows fit."""
    sizes = work.launch.arguments
    golden = _golden_row(work.kernel)
    rows = DEFAULT_SM_COUNT * golden["blocks_per_sm"] * sizes.get("BLOCK_M", 1)
    in_flight = rows * 2 * sizes["V"]
    return 0.8 if in_flight < L2_BYTES else 0.8 * 2 / 3


EFFICIENCIES = (
    Efficiency(
        name="cuBLAS matmul",
        pattern=r"^(b?mm|addmm|baddbmm)_?$",
        value=_cublas,
        reason="measured: 0.88 to 1.0 by K; estimated: whole waves of 128 x 256 tiles, 0.9 for "
        "sizes that are not multiples of 8",
    ),
    Efficiency(
        name="GEMM with epilogue",
        pattern=r"^_gemm_kernel",
        value=_fused,
        reason="0.8 K / (K + 256), estimated from bench/results/h100/tune-gelu.json at K = 768",
    ),
    Efficiency(
        name="attention",
        pattern=r"^_causal_attention_(fwd|bwd_dq|bwd_dkdv|bwd_one_pass)_kernel",
        value=_attention,
        reason="clocks of matrix units, exp2 and issued instructions per tile (golden table); "
        "serialized wgmma does not overlap; reproduces the public rates of Triton's tutorial",
    ),
    Efficiency(
        name="norm forward",
        pattern=r"norm_fwd",
        value=1.0,
        reason="measured",
    ),
    Efficiency(
        name="norm backward",
        pattern=r"norm_bwd",
        value=0.77,
        reason="measured",
    ),
    Efficiency(
        name="loss of rows",
        pattern=r"^_cross_entropy_(fwd|bwd)",
        value=_loss_rows,
        reason="measured: 0.8; estimated: 2/3 of it if the rows in flight exceed the L2 cache",
    ),
    Efficiency(
        name="gradient of the embedding",
        pattern=r"^_?embedding_(dense_backward|bwd)",
        value=1.0,
        reason="measured: 1.4, because the L2 cache has part of the operands",
    ),
    Efficiency(
        name="optimizer",
        pattern=r"^_(fused_adam|foreach)",
        value=0.87,
        reason="measured",
    ),
    Efficiency(
        name="other kernels",
        pattern=r"",
        value=0.8,
        reason="elementwise, sums over rows, copies: 0.75 to 0.9 in public measurements",
    ),
)
