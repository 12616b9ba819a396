"""What a compiled kernel takes and does, read off its machine code: registers, spills, occupancy, the hottest loop's clocks.

    resources     registers and spilled bytes a thread, shared bytes a block, as the assembler states them
    occupancy     blocks on one multiprocessor = least of what registers, shared memory, threads and slots allow
    hottest loop  the innermost loop with most matrix instructions, of equals the shortest, which is the one without masks;
                  without any the one with most bytes loaded, else with most instructions. Of a loop with products what a
                  jump inside it passes over is no part of a pass if it holds none: a persistent kernel goes there once
                  a tile
    clocks        what one pass of a block through it occupies each pipe of a multiprocessor for, sm_80, sm_90 and sm_100. If
                  pipes never waited for one another the pass took the longest of them, if nothing overlapped their sum: two
                  bounds, both estimates. Memory is left out where there are products, whose tiles come out of the cache.
                  Bytes are those of whole tiles, masked lanes included. Sizes that the machine code does not name, of tcgen05
                  products and bulk (TMA) loads, are constants in PTX; copies to and from tensor memory are not counted.
                  Instructions that one warp alone passes through count for all of the block's warps, and HMMA at the full
                  rate of the tensor pipe, though from sm_90 on only HGMMA and tcgen05 reach it

Source     NVIDIA, CUDA C++ Programming Guide, tables "Technical Specifications per Compute Capability" and "Throughput of
           Native Arithmetic Instructions"; tensor rates: data sheets of A100, H200 and B200, FLOP/s shared out by
           multiprocessors and clock; NVIDIA, PTX ISA, "Instruction descriptor" of tcgen05; AMD, CDNA3 Instruction Set
           Architecture, chapter 3
"""

import re
from collections import Counter
from dataclasses import dataclass

from ...kernels.core.device import CEILINGS
from .disassembly import Resources


@dataclass(frozen=True, kw_only=True)
class Stated:
    """Of instructions whose machine code names no size, on average over the loop with most of them.

    tcgen05_flops counts as many bytes of bfloat16; tcgen05_shared_bytes are operands read, tma_bytes those of a bulk load.
    """

    tcgen05_flops: float = 0.0
    tcgen05_shared_bytes: float = 0.0
    tma_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """What blocks share: registers come in units of `register_unit` a warp, shared memory with `shared_reserved` a block."""

    registers: int
    register_unit: int
    shared_bytes: int
    shared_reserved: int
    warps: int
    blocks: int


# A compute unit of CDNA3 has 4 SIMDs of 512 registers by 64 lanes, each holding up to 8 wavefronts.
_AMD = {
    "registers": 4 * 512 * 64,
    "register_unit": 8 * 64,
    "shared_reserved": 0,
    "warps": 32,
    "blocks": 32,
}
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(
        registers=65_536,
        register_unit=256,
        shared_bytes=164 << 10,
        shared_reserved=1024,
        warps=64,
        blocks=32,
    ),
    "sm_90": Multiprocessor(
        registers=65_536,
        register_unit=256,
        shared_bytes=228 << 10,
        shared_reserved=1024,
        warps=64,
        blocks=32,
    ),
    "sm_100": Multiprocessor(
        registers=65_536,
        register_unit=256,
        shared_bytes=228 << 10,
        shared_reserved=1024,
        warps=64,
        blocks=32,
    ),
    "sm_120": Multiprocessor(
        registers=65_536,
        register_unit=256,
        shared_bytes=100 << 10,
        shared_reserved=1024,
        warps=48,
        blocks=24,
    ),
    "gfx942": Multiprocessor(shared_bytes=64 << 10, **_AMD),
    "gfx950": Multiprocessor(shared_bytes=160 << 10, **_AMD),
}

# Names of matrix instructions and of bulk tensor loads, as the disassemblers print them.
_MATRIX = {
    "HGMMA": r"\bHGMMA\b",
    "HMMA": r"\bHMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "MFMA": r"\bv_mfma_",
}
_TMA_LOAD = r"\bUTMALDG\b"

# In PTX: whether a tcgen05 product's a is in tensor memory, and its descriptor; bulk loads.
_TCGEN05 = r"tcgen05\.mma\.\S+ \[[^]]+\], (\[?)[^,]+, [^,]+, (%r\d+),"
_TMA_PTX = r"cp\.async\.bulk\.tensor\.\dd\.shared"

# An m x n step of a matrix instruction is 32 bytes deep, whatever the dtype: 16 of bfloat16, 8 of TF32 at half the rate.
_STEP_BYTES, _STEP_BF16 = 32, 16


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one of a device's multiprocessors does in a clock: FLOPs of dense bf16 products, lanes of other pipes, bytes."""

    multiprocessors: int
    tensor_flops: int
    fma_lanes: int
    imad_lanes: int = 64  # guests in the pipe of fma
    alu_lanes: int = 64
    mufu_lanes: int = 16
    schedulers: int = 4
    shared_bytes: int = 128
    memory_bytes: float


def _rates(device: str, multiprocessors: int, hertz: float, **rates: int) -> Rates:
    memory_bytes = CEILINGS[device].bytes_per_second / multiprocessors / hertz
    return Rates(multiprocessors=multiprocessors, memory_bytes=memory_bytes, **rates)


# Of the device that most know the architecture by, at its boost clock.
RATES = {
    "sm_80": _rates("a100-80gb", 108, 1.41e9, tensor_flops=2048, fma_lanes=64),
    "sm_90": _rates("h200", 132, 1.98e9, tensor_flops=4096, fma_lanes=128),
    "sm_100": _rates("b200", 148, 1.965e9, tensor_flops=8192, fma_lanes=128),
}
_FMA = ("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2")
# Two float32 results a lane, at the rate of one.
_PACKED_FMA = ("FFMA2", "FMUL2", "FADD2")
_CONTROL = (
    "BRA",
    "EXIT",
    "BAR",
    "NOP",
    "BSSY",
    "BSYNC",
    "WARPSYNC",
    "DEPBAR",
    "SYNCS",
    "RET",
    "CALL",
    "ELECT",
)
# LDGSTS copies from memory to shared memory without registers.
_GLOBAL, _SHARED = ("LDG", "STG", "LDGSTS"), ("LDS", "STS", "LDSM", "STSM", "LDGSTS")
_WIDTH = re.compile(r"\.(128|64|U8|S8|U16|S16)\b")


def specialized(compiled) -> bool:
    """Whether some of a block's warps run code of their own: no loop alone then says what the block does."""
    return "ttg.warp_specialize" in compiled.asm.get("ttgir", "")


def all_warps(compiled) -> int:
    """Warps of a block, with those that the compiler added for code of their own."""
    total = re.search(r'"ttg.total-num-warps" = (\d+)', compiled.asm.get("ttgir", ""))
    return int(total.group(1)) if total else compiled.metadata.num_warps


def occupancy(found: Resources, num_warps: int, target: str) -> tuple[int, str]:
    """Blocks that fit on one multiprocessor at once, and what limits them."""
    sm = MULTIPROCESSORS[target]
    lanes = 64 if target.startswith("gfx") else 32
    warp_registers = -(-max(found.registers, 1) * lanes // sm.register_unit) * sm.register_unit
    limits = {
        # A quarter of the registers belongs to each of the four schedulers, which take warps in turn.
        "registers": 4 * (sm.registers // 4 // warp_registers) // num_warps,
        "shared memory": sm.shared_bytes // max(1, found.shared_bytes + sm.shared_reserved),
        "threads": sm.warps // num_warps,
        "blocks": sm.blocks,
    }
    name = min(limits, key=limits.get)
    return limits[name], name


def matrix_instructions(text: str) -> dict[str, int]:
    """How many matrix instructions of each kind the machine code has, kinds that do not occur left out."""
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _MATRIX.items()}
    return {name: count for name, count in counts.items() if count}


def tma_loads(text: str) -> int:
    """How many bulk tensor loads the machine code has."""
    return len(re.findall(_TMA_LOAD, text))


def hottest_loop(sass: str) -> tuple[list[str], list[str], list[str]]:
    """Instructions of the loop that matters most, without predicates and scheduling; the whole kernel if it has no loop.

    Returns: those of each pass, those of now and then, those before and behind the loop.
    """
    lines = re.findall(
        r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ +)?(.*?)\s*;", sass, flags=re.MULTILINE
    )
    code, index_at = (
        [text for _, text in lines],
        {int(address, 16): index for index, (address, _) in enumerate(lines)},
    )
    # A jump to itself is the trap at the end of every kernel.
    jumps = [
        index_at.get(int(text.split("0x")[-1], 16), index)
        if text.startswith("BRA") and "0x" in text
        else index
        for index, text in enumerate(code)
    ]
    loops = []
    for index, target in enumerate(jumps):
        # Nor is a jump back from behind the end: there stand the repeats of waits, out of the way.
        if target < index and not any(line.startswith("EXIT") for line in code[target:index]):
            loops.append((target, index + 1))
    loops = [loop for loop in loops if not _waits(code[slice(*loop)])]
    innermost = [
        loop
        for loop in loops
        if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)
    ]
    # Where all products stand outside of loops, those do nothing that matters.
    products = matrix_instructions("\n".join(code))
    if products and not any(
        matrix_instructions("\n".join(code[slice(*loop)])) for loop in innermost
    ):
        innermost = []
    # Behind the last exit stand a trap and padding.
    end = max(
        (index + 1 for index, text in enumerate(code) if text.startswith("EXIT")), default=len(code)
    )
    if not innermost:
        return code[:end], [], []

    def weight(loop: tuple[int, int]) -> tuple[int, float, int]:
        body = code[slice(*loop)]
        if products := sum(matrix_instructions("\n".join(body)).values()):
            return products, 0, -len(body)
        return 0, _bytes(body, _GLOBAL), len(body)

    start, stop = max(innermost, key=weight)
    seldom: set[int] = set()
    for index in range(start, stop) if products else ():
        # A jump out of the loop ends it, or waits elsewhere and comes back: it passes nothing over.
        passed_over = range(index + 1, jumps[index]) if jumps[index] < stop else ()
        if not matrix_instructions("\n".join(code[i] for i in passed_over)):
            seldom.update(passed_over)
    each, other = (
        [code[i] for i in range(start, stop) if (i in seldom) == wanted] for wanted in (False, True)
    )
    return each, other, code[:start] + code[stop:end]


def _waits(loop: list[str]) -> bool:
    """Whether a loop only asks again whether a barrier was reached."""
    return (
        len(loop) < 8
        and any(text.startswith("SYNCS") for text in loop)
        and not matrix_instructions("\n".join(loop))
    )


def _ptx_loop(ptx: str, pattern: str) -> str:
    """Of PTX the blocks of the loop with most matches, by the comments that LLVM writes; all of it where no loop has any."""
    blocks: dict[str, list[str]] = {}
    label = header = ""
    for line in ptx.splitlines():
        if start := re.match(r"\$L__(BB\w+):|// %bb\.\d+:", line):
            label, header = start.group(1) or "", ""
        if inside := re.search(
            r"// +(?:in Loop: Header=(\w+)|=> *This (?:Inner )?Loop Header)", line
        ):
            header = inside.group(1) or label
        blocks.setdefault(header, []).append(line)
    loops = {header: "\n".join(lines) for header, lines in blocks.items() if header}
    best = max(loops.values(), key=lambda text: len(re.findall(pattern, text)), default="")
    return best if re.search(pattern, best) else ptx


def stated(ptx: str) -> Stated:
    """Read the sizes that PTX has as constants: descriptors of products, bytes that barriers are told to expect."""
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx))
    steps = re.findall(_TCGEN05, _ptx_loop(ptx, _TCGEN05))
    flops = shared = 0
    for bracket, name in steps:
        descriptor = int(constants[name])
        m, n = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
        flops += 2 * m * n * _STEP_BF16
        # An address in brackets is one of tensor memory.
        shared += (n if bracket else m + n) * _STEP_BYTES
    copies = _ptx_loop(ptx, _TMA_PTX)
    expected = sum(map(int, re.findall(r"expect_tx\S* \S+ \[[^]]+\], (\d+);", copies)))
    number, loads = max(1, len(steps)), max(1, len(re.findall(_TMA_PTX, copies)))
    return Stated(
        tcgen05_flops=flops / number,
        tcgen05_shared_bytes=shared / number,
        tma_bytes=expected / loads,
    )


def loop_clocks(compiled, sass: str, target: str) -> list[tuple[list[str], dict[str, float]]]:
    """The parts of a compiled kernel that hottest_loop tells apart, given its disassembly, with clocks on one of RATES."""
    said = stated(compiled.asm["ptx"])
    return [
        (part, clocks(part, compiled.metadata.num_warps, target, said))
        for part in hottest_loop(sass)
    ]


def clocks(
    loop: list[str], num_warps: int, target: str, said: Stated | None = None
) -> dict[str, float]:
    """Estimated clocks that one pass of a block occupies each pipe of a multiprocessor for."""
    said = said or Stated()
    rates = RATES[target]
    counts = Counter(instruction.split()[0].split(".")[0] for instruction in loop)
    fma = sum(counts[name] for name in _FMA)
    packed = sum(counts[name] for name in _PACKED_FMA)
    mufu = counts["MUFU"]
    memory = sum(
        counts[name] for name in counts if re.match(r"LD|ST|RED|ATOM|UTMA|SHFL|UBLK", name)
    )
    other = sum(counts[name] for name in ("HGMMA", "HMMA", *_CONTROL))
    # What the uniform datapath does (names in U) takes issue slots, but none of the lanes.
    uniform = sum(
        count
        for name, count in counts.items()
        if name.startswith("U") and not name.startswith("UTMA")
    )
    alu = len(loop) - fma - packed - counts["IMAD"] - mufu - memory - other - uniform
    lanes = num_warps * 32
    text = "\n".join(loop)
    steps, bulk_bytes = (
        matrix_instructions(text).get("tcgen05", 0),
        tma_loads(text) * said.tma_bytes,
    )
    # A shuffle moves one register of each lane through the same crossbar.
    shared = (_bytes(loop, _SHARED) + 128 * counts["SHFL"] + _operand_bytes(loop)) * num_warps
    shared += steps * said.tcgen05_shared_bytes + bulk_bytes
    return {
        "tensor": (_tensor_flops(loop, num_warps) + steps * said.tcgen05_flops)
        / rates.tensor_flops,
        "mufu": mufu * lanes / rates.mufu_lanes,
        "fma": (fma + 2 * packed) * lanes / rates.fma_lanes
        + counts["IMAD"] * lanes / rates.imad_lanes,
        "alu": alu * lanes / rates.alu_lanes,
        "issue": len(loop) * num_warps / rates.schedulers,
        "shared": shared / rates.shared_bytes,
        "memory": (_bytes(loop, _GLOBAL) * num_warps + bulk_bytes) / rates.memory_bytes,
    }


def bounds(found: dict[str, float]) -> dict[str, float | str]:
    """Estimated share of the ceiling, tensor pipe where there are matrix instructions, else memory: overlapped and serial."""
    of = "tensor" if found["tensor"] else "memory"
    # Other blocks read the tiles of a product too: they come out of the cache, whose rate no vendor states.
    pipes = {name: value for name, value in found.items() if name != "memory" or of == "memory"}
    slowest = max(pipes, key=pipes.get)
    if not pipes[of]:
        return {"of": of, "slowest": slowest, "overlapped": 0.0, "serial": 0.0}
    return {
        "of": of,
        "slowest": slowest,
        "overlapped": pipes[of] / pipes[slowest],
        "serial": pipes[of] / sum(pipes.values()),
    }


def moved(loop: list[str], num_warps: int) -> tuple[int, int]:
    """Bytes of global memory that a block's pass loads and stores, and how many of them most lanes take at once, 0 if none."""
    by_width = Counter()
    for instruction in loop:
        warp_bytes = int(_bytes([instruction], _GLOBAL))
        by_width[warp_bytes // 32] += warp_bytes
    return sum(by_width.values()) * num_warps, max(by_width, key=by_width.get, default=0)


def _bytes(loop: list[str], names: tuple[str, ...]) -> float:
    """Bytes that a warp's loads and stores of these kinds move."""
    total = 0
    for instruction in loop:
        opcode = instruction.split()[0]
        name = opcode.split(".")[0]
        if name not in names:
            continue
        if name in ("LDSM", "STSM"):
            # Matrices of 8 x 16 bytes, one where no number is named.
            count = re.search(r"\.MT?88\.(\d)", opcode)
            total += 128 * int(count.group(1) if count else 1)
            continue
        width = _WIDTH.search(opcode)
        total += (
            32
            * {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2, None: 4}[
                width and width.group(1)
            ]
        )
    return total


def _operand_bytes(loop: list[str]) -> float:
    """Bytes a warp that HGMMA reads from shared memory: b always, a where it is no register; four warps read together."""
    total = 0.0
    for instruction in loop:
        if match := re.match(r"HGMMA\.(\d+)x(\d+)x", instruction):
            m, n = map(int, match.groups())
            rows = n + (m if re.match(r"\S+ R\d+, gdesc", instruction) else 0)
            total += rows * _STEP_BYTES / 4
    return total


def _tensor_flops(loop: list[str], num_warps: int) -> float:
    """FLOPs of a block's matrix instructions, those of TF32 twice: HGMMA is issued by four warps together, HMMA by each."""
    total = 0.0
    for instruction in loop:
        opcode = instruction.split()[0]
        # HGMMA.64x128x16 spells its sizes out, HMMA.16816 runs them together.
        if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(4|8|16)", opcode):
            m, n, k = (int(size) for size in match.groups() if size)
            issues = num_warps / 4 if opcode.startswith("HGMMA") else num_warps
            total += issues * 2 * m * n * k * (2 if "TF32" in opcode else 1)
    return total
