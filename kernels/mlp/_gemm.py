"""A persistent matrix product whose epilogue is the caller's: what follows a product elementwise happens in its registers.

    pre = a b + bias        c = EPILOGUE(pre, aux)        sums = sum_m c, in two stages of fixed order

One program a multiprocessor walks the tiles of c, in groups of GROUP_M rows of tiles whose operands the L2 keeps; the loop over
tiles and the one over K are one to the compiler, so that operands of the next tile are on their way during the epilogue. That
takes a tile in PARTS pieces of columns: fewer registers and, where outputs leave through a descriptor, a smaller buffer.

Shapes     a: (M, K)   b: (K, N)   c, pre, aux: (M, N)   bias, sums: (N,)      a and b of any strides, transposed ones too
Precision  operands and outputs of one dtype; sums over K, epilogue and sums over M in float32, float32 itself without TF32
Cost       2 M N K FLOPs; gemm() says which tensors it reads and writes, each once but for what the L2 does not hold
Source     Triton's tutorial on persistent matmul; grouping: its tutorial on matrix multiplication
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.device import arch, sm_count
from ..core.layout import descriptor
from ..core.partial_sums import empty_partials, sum_partials
from ..core.triton import cdiv, tl, triton

GROUP_M = 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Launch sizes: rows and columns of c and depth of a step, pieces of the epilogue, warps, steps in flight."""

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """Rows of an architecture: whether fusing pays, tiles of large products, of those with an aux beside c, of small ones."""

    fuses: bool
    large: Tile
    aux: Tile
    small: Tile


def _tile(*sizes: int) -> Tile:
    names = ("block_m", "block_n", "block_k", "parts", "num_warps", "num_stages")
    return Tile(**dict(zip(names, sizes, strict=True)))


def _family(
    fuses: bool,
    large: tuple[int, ...],
    *,
    small: tuple[int, ...],
    aux: tuple[int, ...] | None = None,
) -> Family:
    return Family(fuses=fuses, large=_tile(*large), aux=_tile(*(aux or large)), small=_tile(*small))


# By the start of an architecture's name. NOTHING HERE IS MEASURED YET. Tiles are ranked by their machine code (`tritium bench
# codegen`): no spilled registers, then the tensor pipe's share. `fuses` weighs what is spared, an elementwise kernel's two or
# three passes over (N, F), 94 and 140 us of an H200 at 32,768 x 3,072, against an epilogue that nothing overlaps, a third of
# the loop's clocks over K = 768 and a sixth over 1,600 (bench/gemm_peers.py). These estimates favour it by a tenth on H200 and
# A100, by more on consumer cards, whose tensor pipes are slower; on B200 by less than they can tell; for AMD there is none.
FAMILIES = {
    "sm_7": _family(False, (64, 128, 32, 1, 4, 2), small=(64, 64, 32, 1, 4, 2)),
    "sm_9": _family(True, (128, 256, 64, 4, 8, 3), small=(64, 128, 64, 1, 4, 4)),
    # Sums of 128 x 256 and what stands beside them are more than the registers hold.
    "sm_10": _family(
        False, (128, 256, 64, 4, 8, 3), small=(64, 128, 64, 1, 4, 4), aux=(128, 128, 64, 1, 8, 4)
    ),
    # This and the next keep to the 99 KB of shared memory that a program has on consumer cards.
    "sm_12": _family(True, (128, 128, 32, 2, 8, 3), small=(64, 64, 32, 1, 4, 4)),
    "sm_": _family(True, (128, 256, 32, 4, 8, 3), small=(64, 64, 64, 1, 4, 4)),
    "gfx": _family(
        False, (128, 256, 32, 1, 8, 2), small=(64, 64, 64, 1, 4, 2), aux=(128, 128, 64, 1, 8, 2)
    ),
}
# Products of float32 are not the matrix pipe's.
FLOAT32_TILE = _tile(64, 64, 32, 1, 8, 2)


def plan(
    M: int,
    N: int,
    dtype: torch.dtype,
    architecture: str,
    multiprocessors: int,
    *,
    has_aux: bool = False,
) -> tuple[Tile, bool]:
    """Choose the tile of a product, and whether to fuse: only large ones, of 16 bits, that fill every multiprocessor."""
    family = next(row for name, row in FAMILIES.items() if architecture.startswith(name))
    if dtype == torch.float32:
        return FLOAT32_TILE, False
    tile = family.aux if has_aux else family.large
    if cdiv(M, tile.block_m) * cdiv(N, tile.block_n) < multiprocessors:
        return family.small, False
    return tile, family.fuses


def is_fused(products: str, a: Tensor, N: int, *, has_aux: bool = False) -> bool:
    """Whether a (M, K) times (K, N) is to be a product of ours: as `plan` says, or as "fused" or "cublas" asks for."""
    if products != "auto":
        return {"fused": True, "cublas": False}[products]
    # Rows that do not begin at 16 bytes can neither stream nor be loaded whole.
    return (
        a.shape[1] % 8 == N % 8 == 0
        and plan(a.shape[0], N, a.dtype, arch(a.device), sm_count(a.device), has_aux=has_aux)[1]
    )


# --- what a product may end with


@triton.jit
def plain(pre, _):
    return pre


# --- kernel: a program owns every P-th tile of c


@triton.jit
def _operand(
    x, row, column, rows, columns, stride_r, stride_c,
    IS_TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_R, BLOCK_C) of a matrix, zeros outside of it; a descriptor sees a transposed one as it is stored."""
    if isinstance(x, tl.tensor_descriptor):
        return x.load([column, row]).T if IS_TRANSPOSED else x.load([row, column])
    else:
        offs_r, offs_c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        return tl.load(
            x + offs_r.to(tl.int64)[:, None] * stride_r + offs_c.to(tl.int64)[None, :] * stride_c,
            mask=mask,
            other=0.0,
        )


@triton.jit
def _store(x, tile, row, column, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write a tile of a contiguous matrix."""
    if isinstance(x, tl.tensor_descriptor):
        x.store([row, column], tile.to(x.dtype))
    else:
        offs_r, offs_c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        tl.store(
            x + offs_r.to(tl.int64)[:, None] * columns + offs_c[None, :],
            tile.to(x.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def _finish(
    acc, beside, bias_ptr, c, pre, sums_partial_ptr, row, column, M, N,
    EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of BLOCK_N columns, from their sums over K to all that is stored of them."""
    offs_n = column + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        # First, so that it is on its way while the epilogue computes.
        _store(pre, acc, row, column, M, N, BLOCK_M, BLOCK_N)
    tile = EPILOGUE(acc, beside)
    _store(c, tile, row, column, M, N, BLOCK_M, BLOCK_N)
    if sums_partial_ptr is not None:
        # Rows behind the last are sums over K of zeros, and so is what aux holds there; but a bias is added to them too.
        if bias_ptr is not None:
            tile = tl.where((row + tl.arange(0, BLOCK_M) < M)[:, None], tile, 0.0)
        tl.store(
            sums_partial_ptr + (row // BLOCK_M).to(tl.int64) * N + offs_n,
            tl.sum(tile, axis=0),
            mask=offs_n < N,
        )


@triton.jit
def _half(x, SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left (0) or the right (1) half of a tile."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()[SIDE]


@triton.jit
def _gemm_kernel(
    a, b, bias_ptr, aux_ptr, c, pre, sums_partial_ptr,
    stride_am, stride_ak, stride_bk, stride_bn,
    M, N, K,
    EPILOGUE: tl.constexpr, IS_A_TRANSPOSED: tl.constexpr, IS_B_TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=True):
        first_m = tile // (GROUP_M * blocks_n) * GROUP_M
        within, group = tile % (GROUP_M * blocks_n), tl.minimum(blocks_m - first_m, GROUP_M)
        row, column = (first_m + within % group) * BLOCK_M, within // group * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            left = _operand(
                a, row, k, M, K, stride_am, stride_ak, IS_A_TRANSPOSED, BLOCK_M, BLOCK_K
            )
            right = _operand(
                b, k, column, K, N, stride_bk, stride_bn, IS_B_TRANSPOSED, BLOCK_K, BLOCK_N
            )
            acc = tl.dot(left, right, acc, input_precision="ieee")
        beside = None
        if aux_ptr is not None:
            # All of it at once: its way from memory is waited for once, not in every part.
            beside = _operand(aux_ptr, row, column, M, N, N, 1, False, BLOCK_M, BLOCK_N)
        if PARTS == 1:
            _finish(
                acc,
                beside,
                bias_ptr,
                c,
                pre,
                sums_partial_ptr,
                row,
                column,
                M,
                N,
                EPILOGUE,
                BLOCK_M,
                BLOCK_N,
            )
        else:
            for side in tl.static_range(2):
                half, half_beside = _half(acc, side, BLOCK_M, BLOCK_N), None
                if aux_ptr is not None:
                    half_beside = _half(beside, side, BLOCK_M, BLOCK_N)
                if PARTS == 2:
                    _finish(
                        half, half_beside, bias_ptr, c, pre, sums_partial_ptr, row, column + side * (BLOCK_N // 2), M, N,
                        EPILOGUE, BLOCK_M, BLOCK_N // 2,
                    )  # fmt: skip
                else:
                    for inner in tl.static_range(2):
                        quarter, quarter_beside = _half(half, inner, BLOCK_M, BLOCK_N // 2), None
                        if aux_ptr is not None:
                            quarter_beside = _half(half_beside, inner, BLOCK_M, BLOCK_N // 2)
                        _finish(
                            quarter, quarter_beside, bias_ptr, c, pre, sums_partial_ptr,
                            row, column + (2 * side + inner) * (BLOCK_N // 4), M, N, EPILOGUE, BLOCK_M, BLOCK_N // 4,
                        )  # fmt: skip


# --- launcher


def gemm(
    a: Tensor, b: Tensor, bias: Tensor | None = None, aux: Tensor | None = None, *,
    epilogue=plain, pre: Tensor | None = None, sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return c, and write what else is asked for.

    Args:
        a, b: (M, K) and (K, N), one dtype, any strides.
        bias: (N,), added before the epilogue.   aux: (M, N), contiguous, what the epilogue sees beside the sums over K.
        epilogue: jitted function of two tiles, a b + bias in float32 and aux (or None), that returns c's in float32.
        pre: (M, N), contiguous, gets what the epilogue was given.   sums: (N,), any float dtype, gets those of c's columns;
            of an epilogue that gives 0 for 0 and 0, unless there is a bias.
    """
    (M, K), N = a.shape, b.shape[1]
    tile, _ = plan(M, N, a.dtype, arch(a.device), sm_count(a.device), has_aux=aux is not None)
    c = a.new_empty(M, N)
    blocks_m = cdiv(M, tile.block_m)
    sums_partial = None if sums is None else empty_partials(blocks_m, c)
    (left, a_transposed), (right, b_transposed) = (
        _streamed(a, tile.block_m, tile.block_k),
        _streamed(b, tile.block_k, tile.block_n),
    )
    piece = (tile.block_m, tile.block_n // tile.parts)
    _gemm_kernel[(min(blocks_m * cdiv(N, tile.block_n), sm_count(a.device)),)](
        a=left, b=right, bias_ptr=None if bias is None else bias.contiguous(),
        aux_ptr=aux, c=_whole(c, piece), pre=_whole(pre, piece),
        sums_partial_ptr=sums_partial,
        stride_am=a.stride(0), stride_ak=a.stride(1), stride_bk=b.stride(0), stride_bn=b.stride(1), M=M, N=N, K=K,
        EPILOGUE=epilogue, IS_A_TRANSPOSED=a_transposed, IS_B_TRANSPOSED=b_transposed, PARTS=tile.parts, GROUP_M=GROUP_M,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if sums is not None:
        sum_partials(sums_partial, sums)
    return c


def _streamed(x: Tensor, rows: int, columns: int):
    """An operand as a descriptor of its tiles, or itself, and whether it is stored by columns."""
    transposed = x.stride(1) != 1 and x.stride(0) == 1
    stored = descriptor(x.t(), (columns, rows)) if transposed else descriptor(x, (rows, columns))
    # Float32 is multiplied from registers, which what comes through a descriptor takes more of.
    return (x if isinstance(stored, Tensor) or x.dtype == torch.float32 else stored), transposed


def _whole(x: Tensor | None, block: tuple[int, int]):
    return x if x is None or x.dtype == torch.float32 else descriptor(x, block)
