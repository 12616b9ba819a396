"""gemm: accuracy, layouts, tails, epilogues; the choice of tiles; machine code."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.compare import assert_equal
from tests.kernels.mlp.cases import FLOATS, randn, transposed
from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import disassembly, resources
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.bench.codegen.machine_code import matrix_instructions
from tritium.kernels.core.device import arch
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.triton import tl, triton
from tritium.kernels.mlp import gemm as module
from tritium.kernels.mlp._epilogues import ACTIVATIONS
from tritium.kernels.mlp.gemm import FAMILIES, gemm, is_fused, plan

ODD = (33, 129, 17)
ALIGNED = (48, 64, 32)
# M, N, K: one, odd sizes, one past a tile.
SIZES = [(1, 1, 1), (17, 129, 1), (1, 17, 129), (129, 1, 17), ODD, ALIGNED]
LAYOUTS = ["NN", "TN", "TT", "SN", "NS", "EN", "NE"]
# All sizes and dtypes in the layout of a linear layer; all layouts through pointers (odd sizes) and
# through descriptors (aligned sizes).
CASES = [(sizes, "NT", dtype) for sizes in SIZES for dtype in FLOATS]
CASES += [(sizes, layout, torch.bfloat16) for sizes in (ODD, ALIGNED) for layout in LAYOUTS]

kernel = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU"
)


@triton.jit
def scaled(pre, aux):
    """An epilogue that uses both of its arguments."""
    return pre * (1.0 if aux is None else aux.to(tl.float32))


@pytest.fixture
def small_tiles(small_tile, monkeypatch):
    """Use several tiles per axis, in groups of two rows of tiles, and two programs."""
    monkeypatch.setattr(module, "plan", lambda *_, **__: (small_tile, True))
    monkeypatch.setattr(module, "GROUP_M", 2)
    monkeypatch.setattr(module, "sm_count", lambda device: 2)


def in_layout(matrix, letter, row_or_column):
    """Store a matrix contiguous (N), transposed (T), without a unit stride (S) or expanded (E)."""
    if letter == "T":
        return transposed(matrix)
    if letter == "S":
        return torch.stack([matrix] * 2, dim=-1).flatten(1)[:, ::2]
    if letter == "E":
        return matrix[row_or_column].expand(matrix.shape)
    return matrix


def operands(M, N, K, dtype, device, layout="NT"):
    """a (M, K) and b (K, N), each in a layout; bias (N,) and aux (M, N)."""
    shapes = ((M, K), (K, N), (N,), (M, N))
    a, b, bias, aux = randn(shapes, M * 10_007 + N * 101 + K, dtype, device)
    first_row = slice(1)
    first_column = (slice(None), slice(1))
    return in_layout(a, layout[0], first_row), in_layout(b, layout[1], first_column), bias, aux


def all_outputs(a, b, bias, aux):
    """c, pre and sums."""
    pre, sums = torch.empty_like(aux), torch.empty_like(bias)
    return gemm(a, b, bias, aux, epilogue=scaled, pre=pre, sums=sums), pre, sums


def addmm(a, b, bias):
    """a b + bias in float64 and in the dtype of a."""
    return torch.addmm(bias.double(), a.double(), b.double()), torch.addmm(bias, a, b)


def root_sum_squares(values):
    """Return the largest root sum of squares of a column: the magnitude of sums that cancel."""
    return values.square().sum(0).max().sqrt().item()


# --- 2. kernel against float64, 3. layouts


@kernel
@pytest.mark.parametrize(("sizes", "layout", "dtype"), CASES, ids=str)
def test_all_outputs_are_accurate(sizes, layout, dtype, device, small_tiles):
    a, b, bias, aux = operands(*sizes, dtype, device, layout)
    c, pre, sums = all_outputs(a, b, bias, aux)
    h64, h = addmm(a, b, bias)
    c64 = h64 * aux.double()
    length = sum(sizes)
    assert_accurate("pre", pre, h64, h, length=length)
    assert_accurate("c", c, c64, h * aux, length=length)
    scale = root_sum_squares(c64)
    assert_accurate("sums", sums, c64.sum(0), (h * aux).sum(0), length=length, scale=scale)


@kernel
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optional_arguments_can_be_left_out(
    dtype, parts, device, small_tiles, small_tile, monkeypatch
):
    monkeypatch.setattr(module, "plan", lambda *_, **__: (replace(small_tile, parts=parts), True))
    a, b, bias, aux = operands(33, 65, 17, dtype, device)
    ab64, ab = a.double() @ b.double(), a @ b
    assert_accurate("c", gemm(a, b), ab64, ab, length=17)
    c = gemm(a, b, aux=aux, epilogue=scaled)
    assert_accurate("with aux", c, ab64 * aux.double(), ab * aux, length=17)

    h64, h = addmm(a, b, bias)
    baseline = addmm(a.float(), b.float(), bias.float())[1].sum(0)
    for strided in (bias, torch.stack([bias, bias], dim=1)[:, 0]):
        # sums in float32 show that c was not rounded before it was summed.
        sums = torch.empty_like(bias, dtype=torch.float32)
        assert_accurate("with bias", gemm(a, b, strided, sums=sums), h64, h, length=17)
        scale = root_sum_squares(h64)
        assert_accurate("sums", sums, h64.sum(0), baseline, length=50, scale=scale)


@kernel
def test_views_of_larger_matrices_are_accurate(device, small_tiles):
    """Odd offsets and strides, which descriptors do not support, and aligned ones."""
    (base,) = randn([(80, 96)], 0, torch.bfloat16, device)
    for a, b in (
        (base[1:40, 3:20], base[5:22, 1:50]),
        (base[8:40, 16:48], base[:32, 32:96]),
        (base[:32, :48].t(), base[32:64]),
    ):
        assert_accurate("c", gemm(a, b), a.double() @ b.double(), a @ b, length=a.shape[1])


@kernel
def test_sums_of_no_rows_are_zero(device, small_tiles):
    a, b, bias, aux = operands(33, 65, 17, torch.bfloat16, device)
    c, _, sums = all_outputs(a[:0], b, bias, aux[:0])
    assert c.shape == (0, 65)
    assert not sums.any()


@kernel
def test_reruns_are_bitwise_equal(device, small_tiles):
    arguments = operands(33, 65, 17, torch.bfloat16, device)
    assert_equal(all_outputs(*arguments), all_outputs(*arguments))


@kernel
@pytest.mark.parametrize("shape", [(257, 257, 65), (130, 264, 64)])
@pytest.mark.parametrize("name", ["large", "aux", "small"])
def test_shipped_tiles_are_accurate(shape, name, device, monkeypatch):
    """One past a tile, through pointers and descriptors; each program owns several tiles."""
    family = next(family for start, family in FAMILIES.items() if arch(device).startswith(start))
    monkeypatch.setattr(module, "plan", lambda *_, **__: (getattr(family, name), True))
    monkeypatch.setattr(module, "sm_count", lambda device: 2)
    a, b, bias, aux = operands(*shape, torch.bfloat16, device)
    h64, h = addmm(a, b, bias)
    assert_accurate("c", gemm(a, b, bias, epilogue=scaled), h64, h, length=shape[2])
    c = gemm(a, b, bias, aux, epilogue=scaled)
    assert_accurate("with aux", c, h64 * aux.double(), h * aux, length=shape[2])


# --- 4. contract: the choice of tiles and whether to fuse


@pytest.mark.plain
@pytest.mark.parametrize(
    ("target", "multiprocessors"),
    [
        ("sm_90", 132),
        ("sm_100", 148),
        ("sm_80", 108),
        ("sm_86", 82),
        ("sm_120", 170),
        ("gfx942", 304),
    ],
)
def test_only_large_16_bit_matmuls_are_fused(target, multiprocessors):
    family = FAMILIES[next(name for name in FAMILIES if target.startswith(name))]
    large = (32_768, 3072, torch.bfloat16, target, multiprocessors)
    assert plan(*large) == (family.large, family.fuses)
    assert plan(*large, has_aux=True) == (family.aux, family.fuses)
    assert plan(128, 3072, torch.float16, target, multiprocessors) == (family.small, False)
    assert not plan(32_768, 3072, torch.float32, target, multiprocessors)[1]


@pytest.mark.plain
def test_matmuls_with_one_tile_per_multiprocessor_are_fused():
    assert plan(128 * 11, 128 * 12, torch.bfloat16, "sm_90", 132)[1]
    assert not plan(128 * 11, 128 * 11, torch.bfloat16, "sm_90", 132)[1]


@pytest.mark.plain
def test_is_fused_follows_its_argument_or_the_plan():
    a = torch.empty(32768, 768, dtype=torch.bfloat16, device="meta")
    assert is_fused("fused", a[:1], 1)
    assert not is_fused("cublas", a, 3072)
    assert is_fused("auto", a, 3072) == FAMILIES["sm_9"].fuses
    assert not is_fused("auto", a, 3073)
    assert not is_fused("auto", a[:, :767], 3072)


@pytest.mark.codegen
def test_unaligned_operands_take_the_small_tile_and_are_not_fused():
    M, N, K = 32768, 3072, 768
    aligned, b = meta((M, K), (K, N))
    odd_stride, odd_address = meta((M, K + 1), (M * K + 1,))
    strided = next(meta((M, 2 * K)))[:, ::2]
    operands = (odd_stride[:, :K], odd_address[1:].view(M, K), strided)
    for a in (aligned, aligned.t().contiguous().t(), *operands):
        is_aligned = not any(a is operand for operand in operands)
        assert is_fused("auto", a, N) == is_aligned
        with record_launches("sm_90") as launches:
            gemm(a, b)
        tile = FAMILIES["sm_9"].large if is_aligned else FAMILIES["sm_9"].small
        assert launches[0].arguments["BLOCK_N"] == tile.block_n
        assert resources(compile_launch(launches[0], "sm_90")).spilled_bytes == 0


@pytest.mark.plain
def test_tiles_have_parts_that_the_kernel_supports():
    for family in FAMILIES.values():
        for tile in (family.large, family.aux, family.small):
            assert tile.parts in (1, 2, 4)
            # A descriptor stores 16 bytes or more per row.
            assert tile.block_n // tile.parts >= 16


# --- 5. ahead-of-time compilation


def meta(*shapes, dtype=torch.bfloat16):
    return (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)


@pytest.mark.codegen
def test_exact_gelu_gradient_uses_matrix_instructions_and_hardly_spills():
    x, w2, h = meta((32768, 768), (768, 3072), (32768, 3072))
    with record_launches("sm_90") as launches:
        gemm(x, w2, aux=h, epilogue=ACTIVATIONS["gelu"].epilogue_bwd, sums=h[0])
    compiled = compile_launch(launches[0], "sm_90")
    assert matrix_instructions(disassembly(compiled)) == {"HGMMA": 8}
    # 16 bytes, stored and loaded once per tile. With two steps in flight there would be none,
    # but the tile with three is the one that was measured.
    assert resources(compiled).spilled_bytes <= 16


@pytest.mark.codegen
def test_matmuls_with_aux_use_the_tile_for_aux():
    a, b, aux = meta((32768, 768), (768, 3072), (32768, 3072))
    family = FAMILIES["sm_10"]
    assert family.aux != family.large
    with record_launches("sm_100") as launches:
        gemm(a, b, aux=aux, epilogue=scaled)
        gemm(a, b)
    found = [launch.arguments["BLOCK_N"] for launch in launches]
    assert found == [family.aux.block_n, family.large.block_n]


@pytest.mark.codegen
def test_float32_uses_no_matrix_instructions_and_no_descriptors():
    """TF32 would round the operands; descriptors would take more registers."""
    a, b = meta((256, 64), (64, 256), dtype=torch.float32)
    with record_launches("sm_90") as launches:
        gemm(a, b)
    assert matrix_instructions(disassembly(compile_launch(launches[0], "sm_90"))) == {}
    assert launches[0].arguments["a"] is a


@pytest.mark.codegen
def test_compiles_if_every_size_is_one():
    """Triton makes constants of arguments that are 1."""
    one, vector = meta((1, 1), (1,))
    with record_launches("sm_90") as launches:
        all_outputs(one, one, vector, one)
    for launch in launches:
        assert resources(compile_launch(launch, "sm_90")).spilled_bytes == 0
