"""What a compiled kernel takes and does, read off its machine code: registers, spills, occupancy, the hottest loop's clocks.

    resources     registers and spilled bytes a thread, shared bytes a block, as the assembler states them
    occupancy     blocks on one multiprocessor = least of what registers, shared memory, threads and slots allow
    hottest loop  the innermost loop with most matrix instructions, else with most bytes loaded, else with most instructions
    clocks        what one pass of a block through it occupies each pipe of an sm_90 multiprocessor for. If pipes never waited
                  for one another the pass took the longest of them, if nothing overlapped their sum: two bounds, both
                  estimates. Bytes are those of whole tiles, masked lanes included; bulk (TMA) loads do not state theirs, so
                  where they occur memory and shared memory are counted too low

Source     NVIDIA, CUDA C++ Programming Guide, tables "Technical Specifications per Compute Capability" and "Throughput of
           Native Arithmetic Instructions"; AMD, CDNA3 Instruction Set Architecture, chapter 3
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from ..kernels._device import CEILINGS, DEFAULT_SM_COUNT


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one compiled kernel: registers a thread, bytes a thread spilled to memory, shared memory a block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


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
_AMD = {"registers": 4 * 512 * 64, "register_unit": 8 * 64, "shared_reserved": 0, "warps": 32, "blocks": 32}
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(
        registers=65_536, register_unit=256, shared_bytes=164 << 10, shared_reserved=1024, warps=64, blocks=32
    ),
    "sm_90": Multiprocessor(
        registers=65_536, register_unit=256, shared_bytes=228 << 10, shared_reserved=1024, warps=64, blocks=32
    ),
    "sm_100": Multiprocessor(
        registers=65_536, register_unit=256, shared_bytes=228 << 10, shared_reserved=1024, warps=64, blocks=32
    ),
    "sm_120": Multiprocessor(
        registers=65_536, register_unit=256, shared_bytes=100 << 10, shared_reserved=1024, warps=48, blocks=24
    ),
    "gfx942": Multiprocessor(shared_bytes=64 << 10, **_AMD),
    "gfx950": Multiprocessor(shared_bytes=160 << 10, **_AMD),
}

# Names of matrix instructions and of bulk tensor loads, as the disassemblers print them.
_MATRIX = {"HGMMA": r"\bHGMMA\b", "HMMA": r"\bHMMA\b", "tcgen05": r"\bUTC\w*MMA\b", "MFMA": r"\bv_mfma_"}
_TMA_LOAD = r"\bUTMALDG\b"

# Of one sm_90 multiprocessor, a clock: dense bf16 FLOPs, lanes of the other pipes, bytes.
TENSOR_FLOPS, FMA_LANES, ALU_LANES, MUFU_LANES, SCHEDULERS, SHARED_BYTES = 4096, 128, 64, 16, 4, 128
# Boost clock of an H200: what its memory bandwidth is shared out by.
_CLOCK_HERTZ = 1.98e9
MEMORY_BYTES = CEILINGS["h200"].bytes_per_second / DEFAULT_SM_COUNT / _CLOCK_HERTZ
# IMAD, a half-rate guest in the same pipe, is counted twice.
_FMA = ("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2")
_CONTROL = ("BRA", "EXIT", "BAR", "NOP", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "SYNCS", "RET", "CALL")
# LDGSTS copies from memory to shared memory without registers.
_GLOBAL, _SHARED = ("LDG", "STG", "LDGSTS"), ("LDS", "STS", "LDSM", "STSM", "LDGSTS")
_WIDTH = re.compile(r"\.(128|64|U8|S8|U16|S16)\b")


def resources(compiled) -> Resources:
    """Read registers and spills off the machine code of a compiled kernel."""
    shared = compiled.metadata.shared
    if compiled.metadata.target.backend == "hip":
        text = compiled.asm["amdgcn"]
        find = lambda field: int(re.search(rf"\.{field}:\s+(\d+)", text).group(1))  # noqa: E731
        spilled = 4 * (find("vgpr_spill_count") + find("sgpr_spill_count"))
        return Resources(registers=find("vgpr_count"), spilled_bytes=spilled, shared_bytes=shared)
    usage = _cuobjdump(compiled, "--dump-resource-usage")
    # These kernels take no local arrays: a stack frame holds spilled registers and nothing else.
    registers, stack = (int(re.search(rf"\b{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK"))
    return Resources(registers=registers, spilled_bytes=stack, shared_bytes=shared)


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


def disassembly(compiled) -> str:
    """The machine code as text: SASS, or AMD's assembly."""
    return compiled.asm["amdgcn"] if compiled.metadata.target.backend == "hip" else _cuobjdump(compiled, "--dump-sass")


def hottest_loop(sass: str) -> list[str]:
    """Instructions of the loop that matters most, without predicates and scheduling; the whole kernel if it has no loop."""
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ +)?(.*?)\s*;", sass, flags=re.MULTILINE)
    code, index_at = [text for _, text in lines], {int(address, 16): index for index, (address, _) in enumerate(lines)}
    loops = []
    for index, text in enumerate(code):
        # A jump to itself is the trap at the end of every kernel.
        target = index_at.get(int(text.split("0x")[-1], 16), index) if text.startswith("BRA") and "0x" in text else index
        if target < index:
            loops.append((target, index + 1))
    innermost = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    if not innermost:
        # Behind the last exit stand a trap and padding.
        ends = [index for index, text in enumerate(code) if text.startswith("EXIT")]
        return code[: ends[-1] + 1] if ends else code

    def weight(loop: tuple[int, int]) -> tuple[int, float, int]:
        body = code[slice(*loop)]
        return sum(matrix_instructions("\n".join(body)).values()), _bytes(body, _GLOBAL), len(body)

    return code[slice(*max(innermost, key=weight))]


def clocks(loop: list[str], num_warps: int) -> dict[str, float]:
    """Estimated clocks that one pass of a block occupies each pipe of an sm_90 multiprocessor for."""
    counts = Counter(instruction.split()[0].split(".")[0] for instruction in loop)
    fma = sum(counts[name] for name in _FMA) + 2 * counts["IMAD"]
    mufu = counts["MUFU"]
    memory = sum(counts[name] for name in counts if re.match(r"LD|ST|RED|ATOM|UTMA|SHFL|UBLK", name))
    other = sum(counts[name] for name in ("HGMMA", "HMMA", *_CONTROL))
    # What the uniform datapath does (names in U) takes issue slots, but none of the lanes.
    uniform = sum(count for name, count in counts.items() if name.startswith("U") and not name.startswith("UTMA"))
    alu = len(loop) - (fma - counts["IMAD"]) - mufu - memory - other - uniform
    return {
        "tensor": _tensor_clocks(loop, num_warps),
        "mufu": mufu * num_warps * 32 / MUFU_LANES,
        "fma": fma * num_warps * 32 / FMA_LANES,
        "alu": alu * num_warps * 32 / ALU_LANES,
        "issue": len(loop) * num_warps / SCHEDULERS,
        # A shuffle moves one register of each lane through the same crossbar.
        "shared": (_bytes(loop, _SHARED) + 128 * counts["SHFL"] + _operand_bytes(loop)) * num_warps / SHARED_BYTES,
        "memory": _bytes(loop, _GLOBAL) * num_warps / MEMORY_BYTES,
    }


def bounds(found: dict[str, float]) -> dict[str, float | str]:
    """Estimated share of the ceiling, tensor pipe where there are matrix instructions, else memory: overlapped and serial."""
    of = "tensor" if found["tensor"] else "memory"
    slowest = max(found, key=found.get)
    if not found[of]:
        return {"of": of, "slowest": slowest, "overlapped": 0.0, "serial": 0.0}
    return {
        "of": of,
        "slowest": slowest,
        "overlapped": found[of] / found[slowest],
        "serial": found[of] / sum(found.values()),
    }


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
        total += 32 * {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2, None: 4}[width and width.group(1)]
    return total


def _operand_bytes(loop: list[str]) -> float:
    """Bytes a warp that HGMMA reads from shared memory: b always, a where it is no register; four warps read together."""
    total = 0.0
    for instruction in loop:
        if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction):
            m, n, k = map(int, match.groups())
            # 32 bytes along k, whatever the dtype: 16 of bfloat16, 8 of TF32.
            rows = n + (m if re.match(r"\S+ R\d+, gdesc", instruction) else 0)
            total += rows * k * (32 / k) / 4
    return total


def _tensor_clocks(loop: list[str], num_warps: int) -> float:
    """Clocks of a block's matrix instructions: HGMMA is issued by four warps together, HMMA by each; TF32 at half the rate."""
    total = 0.0
    for instruction in loop:
        opcode = instruction.split()[0]
        # HGMMA.64x128x16 spells its sizes out, HMMA.16816 runs them together.
        if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(8|16)", opcode):
            m, n, k = (int(size) for size in match.groups() if size)
            issues = num_warps / 4 if opcode.startswith("HGMMA") else num_warps
            total += issues * 2 * m * n * k / TENSOR_FLOPS * (2 if "TF32" in opcode else 1)
    return total


def _cuobjdump(compiled, what: str) -> str:
    """What Triton's own copy of NVIDIA's tool prints of a kernel's machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run([tool, what, cubin.name], capture_output=True, text=True, check=True).stdout
