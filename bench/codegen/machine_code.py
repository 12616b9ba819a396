"""Read a compiled kernel's machine code: occupancy, instructions, width of memory accesses.

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

# Matrix instructions, as the disassemblers print them.
_MATRIX = {
    "HGMMA": r"\bHGMMA\b",
    "HMMA": r"\bHMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "MFMA": r"\bv_mfma_",
}
# LDGSTS copies from global to shared memory.
_GLOBAL_ACCESS = ("LDG", "STG", "LDGSTS")
_ACCESS_BYTES = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


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
    return len(re.findall(r"\bUTMALDG\b", text))


def instruction_mix(sass: str) -> dict[str, int]:
    """Count the five most frequent instructions of a kernel for NVIDIA GPUs, without modifiers."""
    names = (text.split(".")[0] for text in _instructions(sass))
    # NOPs pad the end of a kernel.
    return dict(Counter(name for name in names if name != "NOP").most_common(5))


def access_bytes(sass: str) -> int:
    """Return the bytes that a lane loads or stores in global memory at once.

    Kernels access memory in several widths: this is the one that moves the most bytes. 0 if no
    instruction of a lane accesses global memory.
    """
    traffic: Counter[int] = Counter()
    for text in _instructions(sass):
        if text.split(".")[0] in _GLOBAL_ACCESS:
            width = re.search(r"\.(128|64|U8|S8|U16|S16)\b", text)
            nbytes = _ACCESS_BYTES[width.group(1)] if width else 4
            traffic[nbytes] += nbytes
    return max(traffic, key=traffic.get, default=0)


def _instructions(sass: str) -> list[str]:
    """Return the instructions with modifiers, without predicates and operands: LDG.E.128 ..."""
    pattern = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([\w.]+)"
    return re.findall(pattern, sass, flags=re.MULTILINE)
