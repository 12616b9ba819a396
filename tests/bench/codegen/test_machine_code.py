import pytest
import torch

from tritium.bench.codegen.disassembly import Resources, disassembly
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.bench.codegen.machine_code import (
    access_bytes,
    hottest_loop,
    instruction_mix,
    matrix_instructions,
    moved_bytes,
    occupancy,
    tma_loads,
)
from tritium.kernels.core.triton import tl, triton

pytestmark = pytest.mark.codegen


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """One BLOCK x BLOCK tile of a b: a (BLOCK, K) and b (K, BLOCK), contiguous."""
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + start + offs_k[None, :])
        b = tl.load(b_ptr + (start + offs_k)[:, None] * BLOCK + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def _descriptor_kernel(a_ptr, c_ptr, M, N, BLOCK: tl.constexpr):
    a = tl.make_tensor_descriptor(a_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    c = tl.make_tensor_descriptor(c_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    c.store([0, 0], a.load([0, 0]) * 2)


@triton.jit
def _exponentials_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    for _ in range(n):
        x = tl.exp2(x)
    tl.store(x_ptr + offs, x)


def compiled(kernel, target, *tensors, **arguments):
    with record_launches(target) as launches:
        kernel[(1,)](*tensors, **arguments, num_warps=4)
    return compile_launch(launches[0], target)


def matmul(dtype, target, block=128):
    a, c = torch.empty(1, device="meta", dtype=dtype), torch.empty(1, device="meta")
    return compiled(_matmul_kernel, target, a, a, c, K=1024, BLOCK=block, BLOCK_K=64)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("sm_80", "HMMA"),
        ("sm_90", "HGMMA"),
        ("sm_100", "tcgen05"),
        ("sm_120", "HMMA"),
        ("gfx942", "MFMA"),
    ],
)
def test_a_matmul_has_the_matrix_instructions_of_its_target(target, name):
    assert set(matrix_instructions(disassembly(matmul(torch.bfloat16, target)))) == {name}


def test_a_float32_matmul_has_matrix_instructions():
    """TF32 uses the tensor cores too."""
    assert matrix_instructions(disassembly(matmul(torch.float32, "sm_90", block=64)))


@pytest.mark.parametrize(("target", "loads"), [("sm_90", 1), ("sm_80", 0)])
def test_descriptor_loads_are_bulk_loads_where_the_target_has_them(target, loads):
    x = torch.empty(1024, device="meta", dtype=torch.bfloat16)
    text = disassembly(compiled(_descriptor_kernel, target, x, x, M=1024, N=1024, BLOCK=64))
    assert tma_loads(text) == loads


def test_the_hottest_loop_of_a_matmul_has_its_matrix_instructions():
    text = disassembly(matmul(torch.bfloat16, "sm_90"))
    loop = hottest_loop(text)
    assert instruction_mix(loop)["HGMMA"] == matrix_instructions(text)["HGMMA"]
    assert len(loop) < text.count("\n")


def test_the_hottest_loop_of_exponentials_is_the_loop_over_them():
    x = torch.empty(1024, device="meta")
    loop = hottest_loop(disassembly(compiled(_exponentials_kernel, "sm_90", x, n=1000, BLOCK=1024)))
    # 8 elements per thread, several iterations of the source in one of the machine code.
    count = sum(text.startswith("MUFU.EX2") for text in loop)
    assert count > 0
    assert count % 8 == 0
    assert moved_bytes(loop, num_warps=4) == 0


@pytest.mark.plain
@pytest.mark.parametrize(
    ("registers", "shared", "warps", "target", "expected"),
    [
        (128, 0, 4, "sm_90", (4, "registers")),
        (255, 0, 8, "sm_90", (1, "registers")),
        # The 16,384 registers of a scheduler hold 4 warps of 112 x 32: 16 warps in total.
        (112, 0, 2, "sm_90", (8, "registers")),
        (16, 0, 32, "sm_90", (2, "threads")),
        (32, 100 << 10, 4, "sm_90", (2, "shared memory")),
        (32, 100 << 10, 4, "sm_80", (1, "shared memory")),
        (16, 0, 1, "sm_80", (32, "blocks")),
        (32, 0, 4, "sm_120", (12, "threads")),
        # 512 registers per lane: 4 wavefronts of 128 on each of 4 SIMDs.
        (128, 0, 4, "gfx942", (4, "registers")),
    ],
)
def test_occupancy_is_the_smallest_of_four_limits(registers, shared, warps, target, expected):
    used = Resources(registers=registers, spilled_bytes=0, shared_bytes=shared)
    assert occupancy(used, warps, target) == expected


@pytest.mark.plain
def test_bytes_per_access_and_per_block():
    loop = [
        "LDG.E.128 R4, desc[UR8][R2.64]",
        "STG.E desc[UR8][R2.64], R4",
        "LDS.128 R8, [R0]",
        "LDGSTS.E.BYPASS.128 [R0], desc[UR8][R2.64]",
        "FFMA R1, R2, R3, R4",
    ]
    assert moved_bytes(loop, num_warps=4) == (16 + 4 + 16) * 32 * 4
    assert access_bytes(loop) == 16
    assert access_bytes(["LDG.E.U16 R0, desc[UR8][R2.64]", *loop[2:3]]) == 2
    assert access_bytes(loop[-1:]) == access_bytes([]) == 0
    assert instruction_mix([*loop, loop[-1]]) == {
        "FFMA": 2,
        "LDG": 1,
        "STG": 1,
        "LDS": 1,
        "LDGSTS": 1,
    }


HGMMA = "HGMMA.64x8x16.F32.BF16 R0, gdesc[UR8], R0"


def listing(*lines):
    return "\n".join(
        f"        /*{16 * number:04x}*/                   {line} ;   /* 0x0 */"
        for number, line in enumerate(lines)
    )


@pytest.mark.plain
def test_of_equal_loops_the_one_without_masks_is_hottest():
    masked = [HGMMA, *(3 * ["FSEL R1, R2, R3, P0"]), "@P0 BRA 0x0"]
    plain = [
        HGMMA,
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR15], R22",
        "@!P4 BRA 0x60",
        "@P0 BRA 0x50",
    ]
    # A repeated wait after the exit jumps back into the loop. It is no loop of its own.
    wait = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR15], R22", "@!P4 BRA 0xa0", "BRA 0x60"]
    loop = hottest_loop(listing(*masked, *plain, "EXIT", *wait))
    assert loop == [*plain[:2], "BRA 0x60", "BRA 0x50"]


@pytest.mark.plain
def test_the_loop_with_matrix_instructions_is_hotter_than_one_with_loads():
    lines = ["LDG.E R0, [R2]", "BRA 0x0", HGMMA, "BRA 0x20", "EXIT", "BRA 0x50", "NOP"]
    assert hottest_loop(listing(*lines)) == lines[2:4]


@pytest.mark.plain
def test_without_a_loop_the_whole_kernel_is_returned():
    """The trap after the exit jumps to itself and is not a loop."""
    lines = ["MOV R1, R2", "EXIT", "BRA 0x20", "NOP"]
    assert hottest_loop(listing(*lines)) == lines[:2]


@pytest.mark.plain
def test_instructions_that_most_iterations_skip_are_left_out():
    body = ["@P1 BRA 0x20", HGMMA, "@P2 BRA 0x50", "MOV R1, R2", "STG.E [R4], R1", "@P0 BRA 0x0"]
    loop = hottest_loop(listing(*body, "EXIT"))
    assert loop == ["BRA 0x20", HGMMA, "BRA 0x50", "BRA 0x0"]
    # A jump to a wait after the exit comes back and skips nothing.
    load = "UTMALDG.2D [UR4], [UR6]"
    loop = hottest_loop(listing(HGMMA, "@!P4 BRA 0x50", load, "@P0 BRA 0x0", "EXIT", "BRA 0x20"))
    assert loop == [HGMMA, "BRA 0x50", load, "BRA 0x0"]


@pytest.mark.plain
def test_a_loop_without_matrix_instructions_is_returned_whole():
    copy = ["@P2 BRA 0x20", "MOV R1, R2", "STG.E [R4], R1", "@P0 BRA 0x0"]
    assert hottest_loop(listing(*copy, "EXIT")) == ["BRA 0x20", *copy[1:3], "BRA 0x0"]
