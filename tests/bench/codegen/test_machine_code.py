import pytest
import torch

from tritium.bench.codegen.disassembly import Resources, disassembly
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.bench.codegen.machine_code import (
    RATES,
    Stated,
    bounds,
    clocks,
    hottest_loop,
    loop_clocks,
    matrix_instructions,
    moved,
    occupancy,
    stated,
    tma_loads,
)
from tritium.kernels.core.triton import tl, triton

pytestmark = pytest.mark.codegen


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """One BLOCK x BLOCK tile of a b: a (BLOCK, K), b (K, BLOCK), rows end to end."""
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


def product(dtype, target, block=128):
    a, b, c = (torch.empty(1, device="meta", dtype=kind) for kind in (dtype, dtype, torch.float32))
    with record_launches(target) as launches:
        _product_kernel[(1,)](a, b, c, K=1024, BLOCK=block, BLOCK_K=64, num_warps=4)
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
def test_matrix_instructions_are_found(target, name):
    assert set(matrix_instructions(disassembly(product(torch.bfloat16, target)))) == {name}


def test_a_product_in_float32_has_no_hgmma_in_bfloat16_but_still_a_matrix_instruction():
    found = matrix_instructions(disassembly(product(torch.float32, "sm_90", block=64)))
    assert found, "TF32 goes through the tensor pipe too"


@pytest.mark.parametrize(("target", "flops"), [("sm_80", 2048), ("sm_90", 4096), ("sm_100", 8192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loop_of_a_product_takes_the_tensor_clocks_that_its_flops_take(dtype, target, flops):
    assert RATES[target].tensor_flops == flops
    block = 128 if dtype is torch.bfloat16 else 64
    compiled = product(dtype, target, block)
    (_, found), *_ = loop_clocks(compiled, disassembly(compiled), target)
    # block x block x 64 multiply-adds, a multiple of it where the loop was unrolled; TF32 at half the rate.
    passes = (
        found["tensor"] / (2 * block * block * 64 / flops) / (1 if dtype is torch.bfloat16 else 2)
    )
    assert passes == round(passes) >= 1
    assert bounds(found)["of"] == "tensor"
    assert 0 < bounds(found)["serial"] < bounds(found)["overlapped"] <= 1


@triton.jit
def _two_products_kernel(
    a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr
):
    """c += (a b) b^T, as attention has it: a (BLOCK, WIDTH), b (K, WIDTH) in steps of BLOCK_N rows."""
    offs, offs_n, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    a = tl.load(a_ptr + offs[:, None] * WIDTH + offs_k[None, :])
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, K, BLOCK_N):
        b = tl.load(b_ptr + (start + offs_n)[:, None] * WIDTH + offs_k[None, :])
        acc = tl.dot(tl.exp2(tl.dot(a, b.T)).to(b.dtype), b, acc)
    tl.store(c_ptr + offs[:, None] * WIDTH + offs_k[None, :], acc)


@pytest.mark.parametrize("target", RATES)
def test_two_products_of_unlike_shapes_count_each_with_its_own(target):
    a, c = torch.empty(1, device="meta", dtype=torch.bfloat16), torch.empty(1, device="meta")
    with record_launches(target) as launches:
        _two_products_kernel[(1,)](a, a, c, K=4096, BLOCK=128, BLOCK_N=64, WIDTH=128, num_warps=4)
    compiled = compile_launch(launches[0], target)
    (loop, found), *_ = loop_clocks(compiled, disassembly(compiled), target)
    assert found["tensor"] == 2 * 2 * 128 * 64 * 128 / RATES[target].tensor_flops
    # A thread of 128 has its share of 128 x 64.
    assert sum(text.startswith("MUFU.EX2") for text in loop) == 128 * 64 // 128
    if target == "sm_100":
        # 8 steps of q k^T, 128 x 64, and 4 of p v, 128 x 128, whose p may stand in tensor memory.
        said = stated(compiled.asm["ptx"])
        assert said.tcgen05_flops == (8 * 2 * 128 * 64 * 16 + 4 * 2 * 128 * 128 * 16) / 12
        assert said.tcgen05_shared_bytes * 12 / 32 in (
            8 * (128 + 64) + 4 * 128,
            8 * (128 + 64) + 4 * (128 + 128),
        )


@pytest.mark.plain
def test_sizes_come_from_constants_in_the_loop():
    step, copy = (
        "tcgen05.mma.cta_group::1.kind::f16 [ %r4 + 0 ],",
        "cp.async.bulk.tensor.4d.shared::cta.global.mbarrier [%r38], [%rd2]",
    )
    ptx = f"""
    mov.b32     %r80, 136381584;
    @%p1 {step} %rd1, %rd2, %r80, %p12;
$L__BB0_3:                              // =>This Loop Header: Depth=1
                                        //     Child Loop BB0_4 Depth 2
    @%p1 {step} %rd1, %rd2, %r80, %p12;
    bra.uni     $L__BB0_4;
$L__BB0_6:                              //   in Loop: Header=BB0_4 Depth=2
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r37], 8192;
    @%p1 {copy};
    @%p1 {copy};
    @%p2 bra    $L__BB0_4;
    bra.uni     $L__BB0_3;
$L__BB0_4:                              //   Parent Loop BB0_3 Depth=1
                                        // =>  This Inner Loop Header: Depth=2
    mov.b32     %r81, 136315024;
    @%p1 {step} %rd1, %rd2, %r81, %p12;
// %bb.5:                               //   in Loop: Header=BB0_4 Depth=2
    @%p1 {step} [ %r9 + 0 ], %rd2, %r81, %p12;
    bra.uni     $L__BB0_6;
$L__BB0_7:
    ret;"""
    # 136315024 >> 17 & 63 = 16 eights of columns, >> 24 = 8 sixteens of rows.
    assert 136381584 >> 17 & 63 == 16
    columns = 8 * (136315024 >> 17 & 63)
    shared = (128 + columns + columns) * 32 / 2
    assert stated(ptx) == Stated(
        tcgen05_flops=2 * 128 * columns * 16, tcgen05_shared_bytes=shared, tma_bytes=4096
    )
    assert stated("ret;") == Stated()


def test_the_loop_of_exponentials_is_bound_by_them():
    x = torch.empty(1024, device="meta")
    with record_launches("sm_90") as launches:
        _exponentials_kernel[(1,)](x, n=1000, BLOCK=1024, num_warps=4)
    loop, *_ = hottest_loop(disassembly(compile_launch(launches[0], "sm_90")))
    found = clocks(loop, 4, "sm_90")
    exponentials = sum(text.startswith("MUFU.EX2") for text in loop)
    assert exponentials
    assert exponentials % 8 == 0, "8 elements a thread"
    assert found["mufu"] == exponentials * 4 * 2
    assert max(found, key=found.get) == "mufu"


def test_bulk_loads_are_found():
    x = torch.empty(1024, device="meta", dtype=torch.bfloat16)
    with record_launches("sm_90") as launches:
        _descriptor_kernel[(1,)](x, x, M=1024, N=1024, BLOCK=64)
    assert tma_loads(disassembly(compile_launch(launches[0], "sm_90"))) == 1
    assert tma_loads(disassembly(compile_launch(launches[0], "sm_80"))) == 0


@pytest.mark.plain
@pytest.mark.parametrize(
    ("registers", "shared", "warps", "target", "expected"),
    [
        (128, 0, 4, "sm_90", (4, "registers")),
        (255, 0, 8, "sm_90", (1, "registers")),
        # 16,384 registers a scheduler hold 4 warps of 112 x 32, so 16 warps in all.
        (112, 0, 2, "sm_90", (8, "registers")),
        (16, 0, 32, "sm_90", (2, "threads")),
        (32, 100 << 10, 4, "sm_90", (2, "shared memory")),
        (32, 100 << 10, 4, "sm_80", (1, "shared memory")),
        (16, 0, 1, "sm_80", (32, "blocks")),
        (32, 0, 4, "sm_120", (12, "threads")),
        # 512 registers a lane: 4 wavefronts of 128 on each of 4 SIMDs.
        (128, 0, 4, "gfx942", (4, "registers")),
    ],
)
def test_occupancy_is_the_least_of_four_limits(registers, shared, warps, target, expected):
    assert (
        occupancy(
            Resources(registers=registers, spilled_bytes=0, shared_bytes=shared), warps, target
        )
        == expected
    )


@pytest.mark.plain
def test_bytes_and_clocks_of_each_pipe():
    loop = [
        "LDG.E.128 R0, desc[UR8][R2.64]", "STG.E R0, R1", "LDS.64 R2, [R3]", "LDSM.16.M88.4 R4, [R5]", "SHFL.BFLY PT, R1, R2",
        "FFMA R1, R2, R3, R4", "IMAD R1, R2, R3, R4", "MUFU.EX2 R1, R2", "LOP3.LUT R1, R2", "UIADD3 UR4, UR4, 0x1", "BRA 0x10",
    ]  # fmt: skip
    found = clocks(loop, 4, "sm_90")
    assert found["shared"] == (32 * 8 + 512 + 128) * 4 / 128
    assert found["fma"] == (1 + 2) * 4 * 32 / 128
    assert found["mufu"] == 4 * 32 / 16
    assert found["alu"] == 4 * 32 / 64
    assert found["issue"] == 11
    assert found["tensor"] == 0
    # An H200 has 4.8 TB/s for 132 multiprocessors at 1.98 GHz.
    assert found["memory"] == pytest.approx((512 + 128) * 4 / (4.8e12 / 132 / 1.98e9))
    assert moved(loop, 4) == ((512 + 128) * 4, 16), "most of the bytes move 16 at a time"
    assert moved(["LDG.E.U16 R0, desc[UR8][R2.64]", *loop[2:]], 1) == (64, 2)
    assert moved(loop[2:], 4) == (0, 0)


@pytest.mark.plain
def test_copies_operands_and_half_rate_products_are_counted():
    copies = clocks(["LDGSTS.E.BYPASS.128 [R0], desc[UR8][R2.64]"], 4, "sm_90")
    assert copies["shared"] == 512 * 4 / 128
    assert copies["memory"] > 0
    both = clocks(["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"], 4, "sm_90")
    assert both["tensor"] == 2 * 64 * 128 * 16 / 4096
    assert both["shared"] == (128 + 64) * 32 / 128
    old = clocks(
        ["HMMA.16816.F32.BF16 R4, R8, R12, R4", "HMMA.1688.F32.TF32 R4, R8, R12, R4"], 4, "sm_90"
    )
    assert old["tensor"] == 4 * (2 * 16 * 8 * 16 / 4096 + 2 * 16 * 8 * 8 / 2048)
    one = clocks(["HGMMA.64x128x8.F32.TF32 R24, R4, gdesc[UR8], R24"], 4, "sm_90")
    assert one["tensor"] == 2 * 64 * 128 * 8 / 2048
    assert one["shared"] == 128 * 32 / 128


@pytest.mark.plain
def test_rates_differ_between_architectures():
    loop = [
        "FFMA R1, R2, R3, R4",
        "IMAD R1, R2, R3, R4",
        "FFMA2 R2, R4, R6, R8",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    ]
    old, new = clocks(loop[:2], 4, "sm_80"), clocks(loop, 4, "sm_100")
    assert old["fma"] == (1 + 1) * 128 / 64
    assert new["fma"] == (1 + 2 + 2) * 128 / 128
    assert new["alu"] == old["alu"] == 0
    assert new["tensor"] == 4 * 2 * 16 * 8 * 16 / 8192
    # B200: 8 TB/s for 148 multiprocessors at 1.965 GHz; A100: 2.039 TB/s for 108 at 1.41 GHz.
    assert RATES["sm_100"].memory_bytes == pytest.approx(27.5, rel=1e-2)
    assert RATES["sm_80"].memory_bytes == pytest.approx(13.4, rel=1e-2)
    said = Stated(tcgen05_flops=8192, tcgen05_shared_bytes=256, tma_bytes=128)
    step = [
        "UTCHMMA gdesc[UR10], gdesc[UR12], tmem[UR7], tmem[UR34], idesc[UR35], UPT",
        "UTMALDG.4D [UR8], [UR22]",
    ]
    found = clocks(step, 4, "sm_100", said)
    assert (found["tensor"], found["shared"], found["alu"]) == (1, 2 + 1, 0)
    assert found["memory"] == 128 / RATES["sm_100"].memory_bytes
    assert bounds(found)["serial"] == pytest.approx(1 / (1 + 3 + found["issue"])), (
        "tiles come out of the cache"
    )


def listing(*lines):
    return "\n".join(
        f"        /*{16 * number:04x}*/                   {line} ;   /* 0x0 */"
        for number, line in enumerate(lines)
    )


@pytest.mark.plain
def test_the_loop_without_masks_is_hottest_and_waits_are_no_loops():
    product = "HGMMA.64x8x16.F32.BF16 R0, gdesc[UR8], R0"
    masked = [product, *(3 * ["FSEL R1, R2, R3, P0"]), "@P0 BRA 0x0"]
    bare = [
        product,
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR15], R22",
        "@!P4 BRA 0x60",
        "@P0 BRA 0x50",
    ]
    # What stands behind the end jumps back into the middle of the loop.
    wait = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR15], R22", "@!P4 BRA 0xa0", "BRA 0x60"]
    found, *_ = hottest_loop(listing(*masked, *bare, "EXIT", *wait))
    assert found == [*bare[:2], "BRA 0x60", "BRA 0x50"]


@pytest.mark.plain
def test_of_two_loops_the_one_with_products_is_hottest_and_traps_do_not_count():
    lines = [
        "LDG.E R0, [R2]",
        "BRA 0x0",
        "HGMMA.64x8x16.F32.BF16 R0, gdesc[UR8], R0",
        "BRA 0x20",
        "EXIT",
        "BRA 0x50",
        "NOP",
    ]
    assert hottest_loop(listing(*lines)) == (lines[2:4], [], [*lines[:2], "EXIT"])
    assert hottest_loop(listing("MOV R1, R2", "EXIT", "BRA 0x20", "NOP")) == (
        ["MOV R1, R2", "EXIT"],
        [],
        [],
    )


@pytest.mark.plain
def test_what_a_jump_passes_over_is_done_now_and_then_unless_it_holds_products():
    product = "HGMMA.64x8x16.F32.BF16 R0, gdesc[UR8], R0"
    body = ["@P1 BRA 0x20", product, "@P2 BRA 0x50", "MOV R1, R2", "STG.E [R4], R1", "@P0 BRA 0x0"]
    found = hottest_loop(listing(*body, "EXIT"))
    assert found == (["BRA 0x20", product, "BRA 0x50", "BRA 0x0"], body[3:5], ["EXIT"])
    # The rest of a pass is behind a jump to a wait out of the way, which comes back.
    load = "UTMALDG.2D [UR4], [UR6]"
    found = hottest_loop(listing(product, "@!P4 BRA 0x50", load, "@P0 BRA 0x0", "EXIT", "BRA 0x20"))
    assert found == ([product, "BRA 0x50", load, "BRA 0x0"], [], ["EXIT"])
    # Without products a pass is all that the loop has.
    copy = ["@P2 BRA 0x20", "MOV R1, R2", "STG.E [R4], R1", "@P0 BRA 0x0"]
    assert hottest_loop(listing(*copy, "EXIT")) == (
        ["BRA 0x20", *copy[1:3], "BRA 0x0"],
        [],
        ["EXIT"],
    )
