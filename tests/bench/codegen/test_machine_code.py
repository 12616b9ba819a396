import pytest
import torch

from tritium.bench.codegen.disassembly import Resources, disassembly
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.bench.codegen.machine_code import (
    access_bytes,
    instruction_mix,
    matrix_instructions,
    occupancy,
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


def matmul(dtype, target, block=128):
    a, c = torch.empty(1, device="meta", dtype=dtype), torch.empty(1, device="meta")
    with record_launches(target) as launches:
        _matmul_kernel[(1,)](a, a, c, K=1024, BLOCK=block, BLOCK_K=64, num_warps=4)
    return compile_launch(launches[0], target)


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


def test_the_instruction_mix_of_a_matmul_counts_what_the_kernel_has():
    text = disassembly(matmul(torch.bfloat16, "sm_90"))
    mix = instruction_mix(text)
    assert len(mix) == 5
    assert "NOP" not in mix
    name, count = next(iter(mix.items()))
    assert 0 < count <= text.count(name)


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
def test_the_width_that_moves_most_bytes_is_reported():
    def listing(*lines):
        return "\n".join(f"        /*{index:04x}*/  {line} ;" for index, line in enumerate(lines))

    narrow = ["@P0 LDG.E.U16 R0, desc[UR8][R2.64]", "@!UP1 LDS.128 R8, [R0]"]
    wide = ["STG.E.128 desc[UR8][R2.64], R4", "LDGSTS.E.BYPASS.128 [R0], desc[UR8][R2.64]"]
    assert access_bytes(listing(*narrow)) == 2
    assert access_bytes(listing(*narrow, "LDG.E R0, desc[UR8][R2.64]")) == 4
    assert access_bytes(listing(*narrow, *wide)) == 16
    assert access_bytes(listing("FFMA R1, R2, R3, R4")) == access_bytes("") == 0
    assert instruction_mix(listing(*wide, *wide, "@P0 LDG.E R0, [R2]")) == {
        "STG": 2,
        "LDGSTS": 2,
        "LDG": 1,
    }
