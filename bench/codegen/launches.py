"""Ahead-of-time compilation of the kernels, for GPUs that need not be there.

The launchers themselves are run, on meta tensors, with the launch replaced by a note of it: what is compiled is exactly what
would have been launched, with the same dtypes, alignments, tiles and warps. Nothing of a kernel's signature is repeated here.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels.core import device as _device

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch as its launcher asked for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@contextlib.contextmanager
def record_launches(arch: str) -> Iterator[list[Launch]]:
    """Note Triton launches instead of running them, planned for one of TARGETS.

    Yields: a list that fills with a `Launch` for each launch made inside the block.
    """
    launches: list[Launch] = []

    def note(kernel, *args, grid, warmup, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for name, value in arguments.items():
            # A launcher may give one descriptor another block for its next launch.
            if isinstance(value, TensorDescriptor):
                arguments[name] = copy.copy(value)
        sizes = grid(arguments) if callable(grid) else grid
        launches.append(Launch(kernel=kernel, grid=tuple(sizes), arguments=arguments))

    original, default = JITFunction.run, _device.DEFAULT_ARCH
    JITFunction.run, _device.DEFAULT_ARCH = note, arch
    try:
        yield launches
    finally:
        JITFunction.run, _device.DEFAULT_ARCH = original, default


def compile_launch(launch: Launch, target: str):
    """Compile a recorded launch for one of TARGETS.

    Returns: Triton's CompiledKernel; `.asm` holds every stage down to the machine code.
    """
    signature, constexprs, attrs = {}, {}, {}
    # What is left of these is no argument but an option, such as num_warps; a backend passes over those of another.
    options = {
        parameter.name: parameter.default
        for parameter in launch.kernel.params
        if parameter.has_default
    }
    options |= launch.arguments
    for index, parameter in enumerate(launch.kernel.params):
        value = options.pop(parameter.name)
        # Triton's own specialization: None and 1 become constants, multiples of 16 are known to be aligned.
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if not (
            parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        ) and _is_aligned(value):
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    return triton.compile(source, target=TARGETS[target], options=options)


def _is_aligned(value) -> bool:
    return isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
