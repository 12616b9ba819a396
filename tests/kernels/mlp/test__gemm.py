"""The product that epilogues ride on: layouts, tails, epilogues, the choice of tiles and whether to fuse."""

from dataclasses import replace

import pytest
import torch

from tests.tolerance import assert_accurate
from tritium.bench.codegen.disassembly import disassembly, resources
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.bench.codegen.machine_code import matrix_instructions
from tritium.kernels.core.device import arch
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.triton import tl, triton
from tritium.kernels.mlp import _gemm
from tritium.kernels.mlp._epilogues import EPILOGUES
from tritium.kernels.mlp._gemm import FAMILIES, gemm, is_fused, plan

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ODD, ALIGNED = (33, 129, 17), (48, 64, 32)
SIZES = [(1, 1, 1), (17, 129, 1), (1, 17, 129), (129, 1, 17), ODD, ALIGNED]
LAYOUTS = ["NN", "TN", "TT", "SN", "NS", "EN", "NE"]
# Every size in every dtype as a linear layer has it; every layout through pointers, and in 16 bits through descriptors.
CASES = [(sizes, "NT", dtype) for sizes in SIZES for dtype in FLOATS]
CASES += [(sizes, layout, torch.bfloat16) for sizes in (ODD, ALIGNED) for layout in LAYOUTS]

kernel = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU"
)


@triton.jit
def scaled(pre, aux):
    """An epilogue that shows both of what it is given."""
    return pre * (1.0 if aux is None else aux.to(tl.float32))


@pytest.fixture
def small_tiles(small_tile, monkeypatch):
    """Several tiles in each direction, groups of two rows of them, two programs that own every other one."""
    monkeypatch.setattr(_gemm, "plan", lambda *_, **__: (small_tile, True))
    monkeypatch.setattr(_gemm, "GROUP_M", 2)
    monkeypatch.setattr(_gemm, "sm_count", lambda device: 2)


def operands(M, N, K, dtype, device, layout="NT"):
    """a (M, K) and b (K, N), T where the matrix is stored by columns; a bias and a matrix beside c."""
    generator = torch.Generator().manual_seed(M * 10_007 + N * 101 + K)
    made = [
        torch.randn(size, generator=generator).to(device, dtype)
        for size in ((M, K), (K, N), (N,), (M, N))
    ]
    for index, letter in enumerate(layout):
        if letter == "T":
            made[index] = made[index].t().contiguous().t()
        elif letter == "S":  # no unit stride
            made[index] = torch.stack([made[index]] * 2, dim=-1).flatten(1)[:, ::2]
        elif letter == "E":  # one row, or for b one column, again and again
            made[index] = (made[index][:1] if index == 0 else made[index][:, :1]).expand(
                made[index].shape
            )
    return made


def everything(a, b, bias, aux):
    """c, what its epilogue was given, and the sums of its columns."""
    pre, sums = torch.empty_like(aux), torch.empty_like(bias)
    return gemm(a, b, bias, aux, epilogue=scaled, pre=pre, sums=sums), pre, sums


@kernel
@pytest.mark.parametrize(("sizes", "layout", "dtype"), CASES, ids=str)
def test_products_are_accurate(sizes, layout, dtype, device, small_tiles):
    a, b, bias, aux = operands(*sizes, dtype, device, layout)
    c, pre, sums = everything(a, b, bias, aux)
    h, h64 = torch.addmm(bias, a, b), torch.addmm(bias.double(), a.double(), b.double())
    length = sum(sizes)
    assert_accurate("pre", pre, h64, h, length=length)
    assert_accurate("c", c, h64 * aux.double(), h * aux, length=length)
    # Sums over rows cancel: what they are of is no smaller than their root of squares.
    scale = (h64 * aux.double()).square().sum(0).max().sqrt().item()
    assert_accurate(
        "sums", sums, (h64 * aux.double()).sum(0), (h * aux).sum(0), length=length, scale=scale
    )


@kernel
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_asked_for_is_not_there(
    dtype, parts, device, small_tiles, small_tile, monkeypatch
):
    monkeypatch.setattr(_gemm, "plan", lambda *_, **__: (replace(small_tile, parts=parts), True))
    a, b, bias, aux = operands(33, 65, 17, dtype, device)
    assert_accurate("c", gemm(a, b), a.double() @ b.double(), a @ b, length=17)
    h, h64 = torch.addmm(bias, a, b), torch.addmm(bias.double(), a.double(), b.double())
    for like in (bias, torch.stack([bias, bias], dim=1)[:, 0]):
        # Wider than what they are sums of, they show that nothing of it was rounded.
        sums = torch.empty_like(bias, dtype=torch.float32)
        assert_accurate("with a bias", gemm(a, b, like, sums=sums), h64, h, length=17)
        scale, peer = (
            h64.square().sum(0).max().sqrt().item(),
            torch.addmm(bias.float(), a.float(), b.float()).sum(0),
        )
        assert_accurate("sums", sums, h64.sum(0), peer, length=50, scale=scale)
    c = gemm(a, b, aux=aux, epilogue=scaled)
    assert_accurate(
        "with aux", c, (a.double() @ b.double()) * aux.double(), (a @ b) * aux, length=17
    )


@kernel
def test_views_into_larger_matrices(device, small_tiles):
    """Odd offsets and strides, which no descriptor takes, and aligned ones, which one does."""
    whole = torch.randn(80, 96, generator=torch.Generator().manual_seed(0)).to(
        device, torch.bfloat16
    )
    for a, b in (
        (whole[1:40, 3:20], whole[5:22, 1:50]),
        (whole[8:40, 16:48], whole[:32, 32:96]),
        (whole[:32, :48].t(), whole[32:64]),
    ):
        assert_accurate("c", gemm(a, b), a.double() @ b.double(), a @ b, length=a.shape[1])


@kernel
def test_empty_and_rerun(device, small_tiles):
    a, b, bias, aux = operands(33, 65, 17, torch.bfloat16, device)
    c, _, sums = everything(a[:0], b, bias, aux[:0])
    assert c.shape == (0, 65)
    assert not sums.any()
    first, again = (everything(a, b, bias, aux) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@kernel
@pytest.mark.parametrize("shape", [(257, 257, 65), (130, 264, 64)])
@pytest.mark.parametrize("name", ["large", "aux", "small"])
def test_shipped_tiles(shape, name, device, monkeypatch):
    """One past a tile, through pointers and descriptors, in programs that own several."""
    family = next(family for start, family in FAMILIES.items() if arch(device).startswith(start))
    monkeypatch.setattr(_gemm, "plan", lambda *_, **__: (getattr(family, name), True))
    monkeypatch.setattr(_gemm, "sm_count", lambda device: 2)
    a, b, bias, aux = operands(*shape, torch.bfloat16, device)
    h, h64 = torch.addmm(bias, a, b), torch.addmm(bias.double(), a.double(), b.double())
    assert_accurate("c", gemm(a, b, bias, epilogue=scaled), h64, h, length=shape[2])
    assert_accurate(
        "c", gemm(a, b, bias, aux, epilogue=scaled), h64 * aux.double(), h * aux, length=shape[2]
    )


# --- what is chosen


@pytest.mark.plain
def test_large_products_of_16_bits_are_fused_where_the_row_says_so():
    counts = {"sm_90": 132, "sm_100": 148, "sm_80": 108, "sm_86": 82, "sm_120": 170, "gfx942": 304}
    for target, multiprocessors in counts.items():
        family = FAMILIES[next(name for name in FAMILIES if target.startswith(name))]
        for has_aux, tile in ((False, family.large), (True, family.aux)):
            assert plan(32768, 3072, torch.bfloat16, target, multiprocessors, has_aux=has_aux) == (
                tile,
                family.fuses,
            )
        assert plan(128, 3072, torch.float16, target, multiprocessors) == (family.small, False)
        assert plan(32768, 3072, torch.float32, target, multiprocessors)[1] is False
    # One tile for each multiprocessor is enough, one fewer is not.
    assert plan(128 * 11, 256 * 12, torch.bfloat16, "sm_90", 132)[1]
    assert not plan(128 * 11, 256 * 11, torch.bfloat16, "sm_90", 132)[1]


@pytest.mark.plain
def test_the_choice_can_be_forced():
    a = torch.empty(32768, 768, dtype=torch.bfloat16, device="meta")
    assert is_fused("fused", a[:1], 1)
    assert not is_fused("cublas", a, 3072)
    assert is_fused("auto", a, 3072) == FAMILIES["sm_9"].fuses
    assert not is_fused("auto", a, 3073)
    assert not is_fused("auto", a[:, :767], 3072)


@pytest.mark.plain
def test_rows_are_tiles_that_the_kernel_takes():
    for family in FAMILIES.values():
        for tile in (family.large, family.aux, family.small):
            assert tile.parts in (1, 2, 4)
            # What leaves through a descriptor is 16 bytes wide at least.
            assert tile.block_n // tile.parts >= 16


@pytest.mark.codegen
def test_the_exact_gelu_keeps_the_matrix_instructions():
    """Its slope has more terms than the tanh form's, which the table holds: a few may wait in memory, once a tile."""
    x, w2, h = (
        torch.empty(size, dtype=torch.bfloat16, device="meta")
        for size in ((32768, 768), (768, 3072), (32768, 3072))
    )
    with record_launches("sm_90") as launches:
        gemm(x, w2, aux=h, epilogue=EPILOGUES["none"][1], sums=h[0])
    compiled = compile_launch(launches[0], "sm_90")
    assert matrix_instructions(disassembly(compiled)) == {"HGMMA": 4}
    # 16 with triton 3.7.1, 32 with 3.6.0.
    assert resources(compiled).spilled_bytes <= 32


@pytest.mark.codegen
def test_products_beside_an_aux_have_a_tile_of_their_own():
    a, b, aux = (
        torch.empty(size, dtype=torch.bfloat16, device="meta")
        for size in ((32768, 768), (768, 3072), (32768, 3072))
    )
    family = FAMILIES["sm_10"]
    assert family.aux != family.large
    with record_launches("sm_100") as launches:
        gemm(a, b, aux=aux, epilogue=scaled)
        gemm(a, b)
    assert [launch.arguments["BLOCK_N"] for launch in launches] == [
        family.aux.block_n,
        family.large.block_n,
    ]


@pytest.mark.codegen
def test_float32_is_not_rounded_to_what_the_matrix_pipe_takes():
    a, b = (torch.empty(size, device="meta") for size in ((256, 64), (64, 256)))
    with record_launches("sm_90") as launches:
        gemm(a, b)
    assert matrix_instructions(disassembly(compile_launch(launches[0], "sm_90"))) == {}
    # What comes through a descriptor takes more registers on its way to them.
    assert launches[0].arguments["a"] is a


@pytest.mark.codegen
def test_compiles_where_every_size_is_one():
    """Triton makes constants of them."""
    one, vector = (
        torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((1, 1), (1,))
    )
    with record_launches("sm_90") as launches:
        everything(one, one, vector, one)
    for launch in launches:
        assert resources(compile_launch(launch, "sm_90")).spilled_bytes == 0
