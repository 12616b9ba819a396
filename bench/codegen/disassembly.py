"""Read the resources and the machine code of compiled kernels.

NVIDIA's ptxas, cuobjdump and nvdisasm come with Triton. AMD's compiler prints assembly.
"""

import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from triton.backends.nvidia.compiler import get_ptxas
from triton.knobs import nvidia

_INSTRUCTION_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Registers per thread, spilled bytes per thread and shared memory per block of a kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def resources(compiled) -> Resources:
    """Return the resources of a compiled kernel, as its assembler states them."""
    shared = compiled.metadata.shared
    if compiled.metadata.target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def find(field):
            return int(re.search(rf"\.{field}:\s+(\d+)", text).group(1))

        spilled = 4 * (find("vgpr_spill_count") + find("sgpr_spill_count"))
        return Resources(registers=find("vgpr_count"), spilled_bytes=spilled, shared_bytes=shared)
    usage = _run_tool(nvidia.cuobjdump.path, ["--dump-resource-usage"], compiled.asm["cubin"])
    # The kernels have no local arrays: the stack holds only spilled registers.
    registers, stack = (
        int(re.search(rf"\b{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK")
    )
    return Resources(registers=registers, spilled_bytes=stack, shared_bytes=shared)


def performance_warnings(compiled) -> list[str]:
    """Return what NVIDIA's assembler says about lost performance when it compiles the kernel again.

    Only kernels with wgmma instructions are compiled again: the warnings are about these.
    """
    ptx = compiled.asm.get("ptx", "")
    if "wgmma" not in ptx:
        return []
    # The assembler was called by Triton before, but Triton does not keep its messages.
    arch = compiled.metadata.target.arch
    options = ["--verbose", "--gpu-name", f"sm_{arch}a", "--output-file", os.devnull]
    messages = _run_tool(get_ptxas(arch).path, options, ptx.encode())
    return [line for line in messages.splitlines() if "Performance Loss" in line]


def disassembly(compiled) -> str:
    """Return the machine code of a compiled kernel as text: SASS, or AMD's assembly."""
    return disassemblies([compiled])[0]


def disassemblies(kernels: Sequence) -> list[str]:
    """Return the machine code of several compiled kernels.

    nvdisasm takes half a second to start, so it runs once per architecture, on the joined
    instructions of all kernels.
    """
    texts = [compiled.asm.get("amdgcn", "") for compiled in kernels]
    archs = [
        compiled.metadata.target.arch if "cubin" in compiled.asm else None for compiled in kernels
    ]
    for arch in {*archs} - {None}:
        codes = {
            index: _instructions(kernels[index].asm["cubin"])
            for index, other in enumerate(archs)
            if other == arch
        }
        # From 9.0 on Triton compiles for the architecture-specific target, such as sm_90a.
        target = f"SM{arch}{'a' if arch >= 90 else ''}"
        listing = _run_tool(nvidia.nvdisasm.path, ["--binary", target], b"".join(codes.values()))
        lines = iter(re.findall(r"^\s+/\*[0-9a-f]+\*/.*", listing, flags=re.MULTILINE))
        for index, code in codes.items():
            texts[index] = "\n".join(islice(lines, len(code) // _INSTRUCTION_BYTES))
    return texts


def _instructions(elf: bytes) -> bytes:
    """Return the sections of a 64-bit ELF file that hold instructions."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, number = struct.unpack_from("<2H", elf, 58)
    sections = [struct.unpack_from("<2I4Q", elf, table + size * index) for index in range(number)]
    executable = 4
    return b"".join(
        elf[begin : begin + length]
        for _, _, flags, _, begin, length in sections
        if flags & executable
    )


def _run_tool(tool: str, options: list[str], data: bytes) -> str:
    """Return the output of one of NVIDIA's tools, errors included, for a file with this data."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [tool, *options, file.name]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
        return done.stdout
