"""A persistent GEMM with an epilogue that the caller chooses: elementwise work done in registers.

    pre = a b + bias    c = EPILOGUE(pre, aux)    sums = sum_m c

One program per multiprocessor goes through tiles of c, in groups of GROUP_M rows of tiles, whose
operands stay in the L2 cache. The compiler flattens the loop over tiles and the loop over K into
one: the operands of the next tile are loaded during the epilogue. The epilogue splits a tile by
columns into PARTS pieces and processes one piece at a time. This needs fewer registers and, for
outputs stored through a descriptor, a smaller buffer.

Shapes     a: (M, K)   b: (K, N)   c, pre, aux: (M, N)   bias, sums: (N,)
           a and b have any strides, also transposed
Precision  operands and outputs of one dtype; sums over K, epilogue and sums over M in float32;
           float32 operands are not rounded to TF32
Order      sums over M are computed in two stages of fixed order
Cost       2 M N K FLOPs; each operand and output moves once, if operands stay in the L2 cache
Source     Triton's tutorials: persistent matmul; matrix multiplication (grouping)
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.device import arch, sm_count
from ..core.launch import launch_kernel
from ..core.layout import TMA_ALIGNMENT, descriptor
from ..core.partial_sums import empty_partials, sum_partials
from ..core.triton import cdiv, tl, triton

# Rows of tiles per group.
GROUP_M = 8


@dataclass(frozen=True)
class Tile:
    """Launch sizes.

    block_m, block_n: rows and columns of a tile of c.   block_k: depth of one step over K.
    parts: pieces of the epilogue.   num_stages: steps over K in flight.
    programs: per multiprocessor. With two, the epilogue of one overlaps with the loop of the other.
    """

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int
    programs: int = 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """Choices for a family of architectures.

    fuses: whether an epilogue is faster than a separate kernel.   large: tile of large GEMMs.
    aux: tile of large GEMMs with an aux operand.   small: tile of GEMMs with few tiles.
    """

    fuses: bool
    large: Tile
    aux: Tile
    small: Tile


def _family(
    fuses: bool,
    large: tuple[int, ...],
    *,
    small: tuple[int, ...],
    aux: tuple[int, ...] | None = None,
) -> Family:
    return Family(
        fuses=fuses,
        large=Tile(*large),
        aux=Tile(*(aux or large)),
        small=Tile(*small),
    )


# Keyed by the start of the architecture's name. The row sm_9 is measured. The others are estimates:
# tiles are ranked by their machine code (`tritium bench codegen`): no spilled registers, then the
# tensor pipe's part of the clocks.
# `fuses` compares two costs. An elementwise kernel makes two or three passes over (N, F). The
# epilogue of a single program per multiprocessor overlaps with nothing: it takes a third of the
# loop's clocks at K = 768, a sixth at 1,600. Fusing wins by a tenth on an A100, by more on consumer
# cards, whose tensor pipes are slower. On B200 the difference is within the error of the estimate.
# There is no estimate for AMD.
FAMILIES = {
    # Two programs per multiprocessor: the epilogue of one overlaps with the loop of the other. The
    # GELU MLP of 65,536 x 768, forward and backward, takes 3.20 ms on an H100 (November 2026). It
    # takes 3.41 ms with one program of 128 x 256, or with cuBLAS and an elementwise kernel.
    "sm_9": _family(True, (128, 128, 64, 4, 4, 3, 2), small=(64, 128, 64, 1, 4, 4)),
    # With aux, an accumulator of 128 x 256 does not fit in the registers.
    "sm_10": _family(
        False, (128, 256, 64, 4, 8, 3), small=(64, 128, 64, 1, 4, 4), aux=(128, 128, 64, 1, 8, 4)
    ),
    # sm_12 and sm_8: consumer cards have 99 KB of shared memory per program.
    "sm_12": _family(True, (128, 128, 32, 2, 8, 3), small=(64, 64, 32, 1, 4, 4)),
    "sm_": _family(True, (128, 256, 32, 4, 8, 3), small=(64, 64, 64, 1, 4, 4)),
    "gfx": _family(
        False, (128, 256, 32, 1, 8, 2), small=(64, 64, 64, 1, 4, 2), aux=(128, 128, 64, 1, 8, 2)
    ),
}
# Without TF32, float32 matmuls do not use the tensor cores.
FLOAT32_TILE = Tile(64, 64, 32, 1, 8, 2)


@functools.lru_cache(maxsize=1024)
def plan(
    M: int,
    N: int,
    dtype: torch.dtype,
    architecture: str,
    multiprocessors: int,
    *,
    has_aux: bool = False,
    is_aligned: bool = True,
) -> tuple[Tile, bool]:
    """Choose the tile of a GEMM, and whether to fuse the elementwise work into it.

    Only 16-bit GEMMs with at least one tile per multiprocessor are fused. Operands that are not
    aligned to 16 bytes take a small tile: the addresses of a large one do not fit in the registers.
    """
    family = next(row for name, row in FAMILIES.items() if architecture.startswith(name))
    if dtype == torch.float32:
        return FLOAT32_TILE, False
    tile = family.aux if has_aux else family.large
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    if tiles < multiprocessors or not is_aligned:
        return family.small, False
    return tile, family.fuses


def is_fused(matmul: str, a: Tensor, N: int, *, has_aux: bool = False) -> bool:
    """Whether gemm() should multiply a (M, K) by a (K, N) matrix. If not, cuBLAS does.

    `matmul` is "fused", "cublas", or "auto", which asks plan().
    """
    if matmul != "auto":
        return {"fused": True, "cublas": False}[matmul]
    M, K = a.shape
    if K % 8 or N % 8 or not _is_aligned(a):
        return False
    return plan(M, N, a.dtype, arch(a.device), sm_count(a.device), has_aux=has_aux)[1]


def _is_aligned(x: Tensor) -> bool:
    """Whether rows or columns start at multiples of 16 bytes, as descriptors need."""
    is_address_aligned = x.data_ptr() % TMA_ALIGNMENT == 0
    return is_address_aligned and _are_aligned(x.shape, x.stride(), x.element_size())


@functools.lru_cache(maxsize=1024)
def _are_aligned(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether the strides of `_is_aligned` are 1 or multiples of 16 bytes."""
    return 1 in strides and all(
        stride == 1 or size == 1 or stride * itemsize % TMA_ALIGNMENT == 0
        for size, stride in zip(shape, strides, strict=True)
    )


# --- the default epilogue


@triton.jit
def plain(pre, _):
    return pre


# --- kernel: each of P programs owns every P-th tile of c


@triton.jit
def _load_tile(
    x, row, column, rows, columns, stride_r, stride_c,
    IS_TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Load a tile (BLOCK_R, BLOCK_C) of a matrix, with zeros outside of the matrix.

    The descriptor of a transposed matrix describes it as stored: (columns, rows).
    """
    if isinstance(x, tl.tensor_descriptor):
        return x.load([column, row]).T if IS_TRANSPOSED else x.load([row, column])
    else:
        offs_r, offs_c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        offs = offs_r.to(tl.int64)[:, None] * stride_r + offs_c.to(tl.int64)[None, :] * stride_c
        return tl.load(x + offs, mask=mask, other=0.0)


@triton.jit
def _store_tile(x, tile, row, column, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store a tile of a contiguous matrix."""
    if isinstance(x, tl.tensor_descriptor):
        x.store([row, column], tile.to(x.dtype))
    else:
        offs_r, offs_c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        offs = offs_r.to(tl.int64)[:, None] * columns + offs_c[None, :]
        tl.store(x + offs, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    acc, aux, bias_ptr, c, pre, sums_partial_ptr, row, column, M, N,
    EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Apply the epilogue to BLOCK_N columns of a tile, and store all outputs."""
    offs_n = column + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        # Stored first, so that the store overlaps with the epilogue.
        _store_tile(pre, acc, row, column, M, N, BLOCK_M, BLOCK_N)
    tile = EPILOGUE(acc, aux)
    _store_tile(c, tile, row, column, M, N, BLOCK_M, BLOCK_N)
    if sums_partial_ptr is not None:
        # Rows past M are 0, in acc and in aux, unless the bias was added to them.
        if bias_ptr is not None:
            tile = tl.where((row + tl.arange(0, BLOCK_M) < M)[:, None], tile, 0.0)
        tl.store(
            sums_partial_ptr + (row // BLOCK_M).to(tl.int64) * N + offs_n,
            tl.sum(tile, axis=0),
            mask=offs_n < N,
        )


@triton.jit
def _half(x, SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left (SIDE 0) or right (SIDE 1) half of the columns of a tile."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()[SIDE]


@triton.jit
def _gemm_kernel(
    a, b, bias_ptr, aux_ptr, c, pre, sums_partial_ptr,
    stride_am, stride_ak, stride_bk, stride_bn,
    M, N, K,
    EPILOGUE: tl.constexpr, IS_A_TRANSPOSED: tl.constexpr, IS_B_TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store c and, unless their pointers are None, pre and partial sums of the columns of c."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=True):
        # position of the tile: groups of GROUP_M rows of tiles, column by column
        first_m = tile // (GROUP_M * blocks_n) * GROUP_M
        within = tile % (GROUP_M * blocks_n)
        group = tl.minimum(blocks_m - first_m, GROUP_M)
        row = (first_m + within % group) * BLOCK_M
        column = within // group * BLOCK_N

        # matmul
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            left = _load_tile(
                a, row, k, M, K, stride_am, stride_ak, IS_A_TRANSPOSED, BLOCK_M, BLOCK_K
            )
            right = _load_tile(
                b, k, column, K, N, stride_bk, stride_bn, IS_B_TRANSPOSED, BLOCK_K, BLOCK_N
            )
            acc = tl.dot(left, right, acc, input_precision="ieee")

        # epilogue, in PARTS pieces of columns
        if PARTS == 1:
            aux = None
            if aux_ptr is not None:
                aux = _load_tile(aux_ptr, row, column, M, N, N, 1, False, BLOCK_M, BLOCK_N)
            _finish(
                acc, aux, bias_ptr, c, pre, sums_partial_ptr, row, column, M, N,
                EPILOGUE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            for side in tl.static_range(2):
                half, half_aux = _half(acc, side, BLOCK_M, BLOCK_N), None
                if aux_ptr is not None:
                    # With the whole tile of aux in registers, exact GELU and SwiGLU spill on sm_90.
                    half_aux = _load_tile(
                        aux_ptr, row, column + side * (BLOCK_N // 2), M, N, N, 1, False,
                        BLOCK_M, BLOCK_N // 2,
                    )  # fmt: skip
                if PARTS == 2:
                    _finish(
                        half, half_aux, bias_ptr, c, pre, sums_partial_ptr,
                        row, column + side * (BLOCK_N // 2), M, N,
                        EPILOGUE, BLOCK_M, BLOCK_N // 2,
                    )  # fmt: skip
                else:
                    for inner in tl.static_range(2):
                        quarter, quarter_aux = _half(half, inner, BLOCK_M, BLOCK_N // 2), None
                        if aux_ptr is not None:
                            quarter_aux = _half(half_aux, inner, BLOCK_M, BLOCK_N // 2)
                        _finish(
                            quarter, quarter_aux, bias_ptr, c, pre, sums_partial_ptr,
                            row, column + (2 * side + inner) * (BLOCK_N // 4), M, N,
                            EPILOGUE, BLOCK_M, BLOCK_N // 4,
                        )  # fmt: skip


# --- launcher


def gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    aux: Tensor | None = None,
    *,
    epilogue=plain,
    pre: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Return c = epilogue(a b + bias, aux), and write the optional outputs.

    Args:
        a, b: (M, K) and (K, N), same dtype, any strides.
        bias: (N,), added before the epilogue.
        aux: (M, N), contiguous, second argument of the epilogue.
        epilogue: jitted function of two tiles, a b + bias in float32 and aux (or None). Returns the
            tile of c in float32.
        pre: (M, N), contiguous. Receives a b + bias.
        sums: (N,), any float dtype. Receives the sums of the columns of c. Without a bias it needs
            an epilogue with epilogue(0, 0) = 0.
    Returns: (M, N), dtype of a.
    """
    (M, K), N = a.shape, b.shape[1]
    multiprocessors = sm_count(a.device)
    tile, _ = plan(
        M,
        N,
        a.dtype,
        arch(a.device),
        multiprocessors,
        has_aux=aux is not None,
        is_aligned=N % 8 == 0 and _is_aligned(a) and _is_aligned(b),
    )
    blocks_m = cdiv(M, tile.block_m)

    # outputs
    c = a.new_empty(M, N)
    sums_partial = None if sums is None else empty_partials(blocks_m, c)
    piece = (tile.block_m, tile.block_n // tile.parts)

    # operands
    left, a_transposed = _operand_descriptor(a, tile.block_m, tile.block_k)
    right, b_transposed = _operand_descriptor(b, tile.block_k, tile.block_n)

    programs = min(blocks_m * cdiv(N, tile.block_n), multiprocessors * tile.programs)
    launch_kernel(_gemm_kernel, (programs,),
        a=left, b=right, bias_ptr=None if bias is None else bias.contiguous(), aux_ptr=aux,
        c=_output_descriptor(c, piece), pre=_output_descriptor(pre, piece),
        sums_partial_ptr=sums_partial,
        stride_am=a.stride(0), stride_ak=a.stride(1), stride_bk=b.stride(0), stride_bn=b.stride(1),
        M=M, N=N, K=K,
        EPILOGUE=epilogue, IS_A_TRANSPOSED=a_transposed, IS_B_TRANSPOSED=b_transposed,
        PARTS=tile.parts, GROUP_M=GROUP_M,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if sums is not None:
        sum_partials(sums_partial, sums)
    return c


def _operand_descriptor(x: Tensor, rows: int, columns: int):
    """Return a descriptor of tiles of x, or x, and whether x is stored transposed."""
    transposed = x.stride(1) != 1 and x.stride(0) == 1
    if x.dtype == torch.float32:
        # float32 operands are in registers. Tiles from a descriptor would take more registers.
        return x, transposed
    stored = descriptor(x.t(), (columns, rows)) if transposed else descriptor(x, (rows, columns))
    return (x if isinstance(stored, Tensor) else stored), transposed


def _output_descriptor(x: Tensor | None, block: tuple[int, int]):
    return x if x is None or x.dtype == torch.float32 else descriptor(x, block)
