"""What NVIDIA's tools, of which Triton has its own copy, and AMD's assembly say of a compiled kernel."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import triton

_INSTRUCTION_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one compiled kernel: registers a thread, bytes a thread spilled to memory, shared memory a block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def resources(compiled) -> Resources:
    """Read registers and spills off the machine code of a compiled kernel."""
    shared = compiled.metadata.shared
    if compiled.metadata.target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def find(field):
            return int(re.search(rf"\.{field}:\s+(\d+)", text).group(1))

        spilled = 4 * (find("vgpr_spill_count") + find("sgpr_spill_count"))
        return Resources(registers=find("vgpr_count"), spilled_bytes=spilled, shared_bytes=shared)
    usage = _nvidia("cuobjdump", ["--dump-resource-usage"], compiled.asm["cubin"])
    # These kernels take no local arrays: a stack frame holds spilled registers and nothing else.
    registers, stack = (
        int(re.search(rf"\b{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK")
    )
    return Resources(registers=registers, spilled_bytes=stack, shared_bytes=shared)


def disassembly(compiled) -> str:
    """The machine code as text: SASS, or AMD's assembly."""
    return disassemblies([compiled])[0]


def disassemblies(kernels: Sequence) -> list[str]:
    """Machine code of many kernels, quickly: NVIDIA's tool takes half a second to begin, whatever it reads."""
    texts = [compiled.asm.get("amdgcn", "") for compiled in kernels]
    archs = [
        compiled.metadata.target.arch if "cubin" in compiled.asm else None for compiled in kernels
    ]
    for arch in {*archs} - {None}:
        codes = {
            index: _code(kernels[index].asm["cubin"])
            for index, other in enumerate(archs)
            if other == arch
        }
        # Where Triton compiles for a capability it takes the instructions that no other has, from 9.0 on named "a".
        listing = _nvidia(
            "nvdisasm",
            ["--binary", f"SM{arch}{'a' if arch >= 90 else ''}"],
            b"".join(codes.values()),
        )
        lines = iter(re.findall(r"^\s+/\*[0-9a-f]+\*/.*", listing, flags=re.MULTILINE))
        for index, code in codes.items():
            texts[index] = "\n".join(islice(lines, len(code) // _INSTRUCTION_BYTES))
    return texts


def _code(elf: bytes) -> bytes:
    """The sections of a 64-bit ELF file that hold instructions."""
    (table,), (size, number) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<2H", elf, 58)
    sections = [struct.unpack_from("<2I4Q", elf, table + size * index) for index in range(number)]
    return b"".join(
        elf[begin : begin + length] for _, _, flags, _, begin, length in sections if flags & 4
    )


def _nvidia(tool: str, words: list[str], data: bytes) -> str:
    """What a tool of NVIDIA's prints of a file with this data; Triton has its own copy of them."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [
            Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool,
            *words,
            file.name,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
