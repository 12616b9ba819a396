"""Read a compiled kernel's machine code: occupancy, matrix instructions, the hottest loop.

    occupancy     blocks per multiprocessor: the smallest limit of registers, shared memory, threads
                  and slots
    hottest loop  the innermost loop with the most matrix instructions; the shortest of equal ones,
                  which has no masks. In kernels without matrix instructions the loop that moves the
                  most bytes, then the longest one. NVIDIA only
    serialized    a loop waits for each of its HGMMA instructions before it issues the next one. It
                  should issue all of a matmul and wait once

Source     NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability";
           AMD, CDNA3 Instruction Set Architecture, chapter 3
"""

import re
from collections import Counter
from dataclasses import dataclass

from .disassembly import Resources


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """Limits of one multiprocessor.

    Warps take registers in multiples of `register_unit`. Each block takes `shared_reserved` bytes
    of shared memory for the driver.
    """

    registers: int
    register_unit: int
    shared_bytes: int
    shared_reserved: int
    warps: int
    blocks: int


_NVIDIA = {"registers": 65_536, "register_unit": 256, "shared_reserved": 1024}
# A compute unit of CDNA3 has 4 SIMDs of 512 registers x 64 lanes. Each SIMD holds 8 wavefronts.
_AMD = {
    "registers": 4 * 512 * 64,
    "register_unit": 8 * 64,
    "shared_reserved": 0,
    "warps": 32,
    "blocks": 32,
}
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_bytes=164 << 10, warps=64, blocks=32, **_NVIDIA),
    "sm_90": Multiprocessor(shared_bytes=228 << 10, warps=64, blocks=32, **_NVIDIA),
    "sm_100": Multiprocessor(shared_bytes=228 << 10, warps=64, blocks=32, **_NVIDIA),
    "sm_120": Multiprocessor(shared_bytes=100 << 10, warps=48, blocks=24, **_NVIDIA),
    "gfx942": Multiprocessor(shared_bytes=64 << 10, **_AMD),
    "gfx950": Multiprocessor(shared_bytes=160 << 10, **_AMD),
}

# Matrix instructions and bulk tensor loads, as the disassemblers print them.
_MATRIX = {
    "HGMMA": r"\bHGMMA\b",
    "HMMA": r"\bHMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "MFMA": r"\bv_mfma_",
}
_TMA_LOAD = r"\bUTMALDG\b"
# Waits until all HGMMA instructions are done.
_WAIT_FOR_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
# LDGSTS copies from global to shared memory.
_GLOBAL_ACCESS = ("LDG", "STG", "LDGSTS")
_ACCESS_BYTES = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


def is_specialized(compiled) -> bool:
    """Whether some warps of a block run other code than the rest, so that no loop is hottest."""
    return "ttg.warp_specialize" in compiled.asm.get("ttgir", "")


def all_warps(compiled) -> int:
    """Return the warps per block, including those that warp specialization adds."""
    total = re.search(r'"ttg.total-num-warps" = (\d+)', compiled.asm.get("ttgir", ""))
    return int(total.group(1)) if total else compiled.metadata.num_warps


def occupancy(used: Resources, num_warps: int, target: str) -> tuple[int, str]:
    """Return how many blocks fit on one multiprocessor at once, and what limits them."""
    sm = MULTIPROCESSORS[target]
    lanes = 64 if target.startswith("gfx") else 32
    warp_registers = -(-max(used.registers, 1) * lanes // sm.register_unit) * sm.register_unit
    limits = {
        # Each of the four schedulers owns a quarter of the registers and of the block's warps.
        "registers": 4 * (sm.registers // 4 // warp_registers) // num_warps,
        "shared memory": sm.shared_bytes // max(1, used.shared_bytes + sm.shared_reserved),
        "threads": sm.warps // num_warps,
        "blocks": sm.blocks,
    }
    name = min(limits, key=limits.get)
    return limits[name], name


def matrix_instructions(text: str) -> dict[str, int]:
    """Count the matrix instructions in machine code by name."""
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _MATRIX.items()}
    return {name: count for name, count in counts.items() if count}


def tma_loads(text: str) -> int:
    """Count the bulk tensor loads in machine code."""
    return len(re.findall(_TMA_LOAD, text))


def instruction_mix(loop: list[str]) -> dict[str, int]:
    """Count the eight most frequent instructions by name, without their modifiers."""
    return dict(Counter(map(_name, loop)).most_common(8))


def moved_bytes(loop: list[str], num_warps: int) -> int:
    """Return the bytes of global memory that one iteration of a block loads and stores."""
    return sum(32 * _access_bytes(instruction) for instruction in loop) * num_warps


def access_bytes(loop: list[str]) -> int:
    """Return the bytes that a lane loads or stores at once in most of the traffic; 0 if none."""
    traffic: Counter[int] = Counter()
    for instruction in loop:
        width = _access_bytes(instruction)
        traffic[width] += width
    return max(traffic, key=traffic.get, default=0)


def hottest_loop(sass: str) -> list[str]:
    """Return the instructions that every iteration of the hottest loop runs.

    Args:
        sass: disassembly of a kernel for NVIDIA GPUs.
    Returns: instructions without predicates and addresses. The whole kernel if no loop matters.
    """
    code, jumps = _parse(sass)
    loops = _innermost_loops(code, jumps)
    if not loops:
        # A trap and padding follow the last exit.
        exits = [index for index, text in enumerate(code) if text.startswith("EXIT")]
        return code[: exits[-1] + 1] if exits else code
    start, stop = max(loops, key=lambda loop: _weight(code[slice(*loop)]))
    if not _has_matrix(code[start:stop]):
        return code[start:stop]
    # A persistent kernel jumps over its epilogue in most iterations. Jumps out of the loop skip
    # nothing: they leave it, or wait elsewhere and come back.
    skipped: set[int] = set()
    for index in range(start, stop):
        passed = range(index + 1, jumps[index]) if jumps[index] < stop else ()
        if not _has_matrix([code[i] for i in passed]):
            skipped.update(passed)
    return [code[i] for i in range(start, stop) if i not in skipped]


def is_serialized(sass: str) -> bool:
    """Whether an innermost loop waits for each of its HGMMA instructions on its own."""
    code, jumps = _parse(sass)
    for start, stop in _innermost_loops(code, jumps):
        names = [text for text in code[start:stop] if text.startswith(("HGMMA", _WAIT_FOR_ALL))]
        starts = [index for index, text in enumerate(names) if text.startswith("HGMMA")]
        waits = [names[index + 1 : index + 2] for index in starts]
        if len(starts) > 1 and all(wait and wait[0].startswith(_WAIT_FOR_ALL) for wait in waits):
            return True
    return False


def _parse(sass: str) -> tuple[list[str], list[int]]:
    """Return the instructions, and for each the index it jumps to: its own if it does not jump."""
    lines = re.findall(
        r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ +)?(.*?)\s*;", sass, flags=re.MULTILINE
    )
    code = [text for _, text in lines]
    index_at = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    jumps = [
        index_at.get(int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16), index)
        if text.startswith("BRA") and "0x" in text
        else index
        for index, text in enumerate(code)
    ]
    return code, jumps


def _innermost_loops(code: list[str], jumps: list[int]) -> list[tuple[int, int]]:
    """Return the start and stop of the innermost loops; none if no loop has the matrix work."""
    loops = [
        (target, index + 1)
        for index, target in enumerate(jumps)
        # Repeated waits stand behind the exit. Their jumps back into the kernel are no loops.
        if target < index and not any(text.startswith("EXIT") for text in code[target:index])
    ]
    loops = [loop for loop in loops if not _is_wait(code[slice(*loop)])]
    innermost = [
        loop
        for loop in loops
        if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)
    ]
    if _has_matrix(code) and not any(_has_matrix(code[slice(*loop)]) for loop in innermost):
        return []
    return innermost


def _weight(loop: list[str]) -> tuple[int, int, int]:
    """Order loops as the top of this file says."""
    if count := sum(matrix_instructions("\n".join(loop)).values()):
        return count, 0, -len(loop)
    return 0, moved_bytes(loop, num_warps=1), len(loop)


def _is_wait(loop: list[str]) -> bool:
    """Whether a loop only waits for a barrier."""
    is_short = len(loop) < 8 and not _has_matrix(loop)
    return is_short and any(text.startswith("SYNCS") for text in loop)


def _has_matrix(instructions: list[str]) -> bool:
    return bool(matrix_instructions("\n".join(instructions)))


def _name(instruction: str) -> str:
    """HGMMA.64x128x16.F32 R0, ... -> HGMMA"""
    return instruction.split()[0].split(".")[0]


def _access_bytes(instruction: str) -> int:
    """Return the bytes that a lane loads or stores in global memory."""
    if _name(instruction) not in _GLOBAL_ACCESS:
        return 0
    width = re.search(r"\.(128|64|U8|S8|U16|S16)\b", instruction.split()[0])
    return _ACCESS_BYTES[width.group(1)] if width else 4
