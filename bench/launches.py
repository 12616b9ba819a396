"""Ahead-of-time compilation of the kernels, for GPUs that need not be there.

The launchers themselves are run, on meta tensors, with the launch replaced by a note of it: what is compiled is exactly what
would have been launched, with the same dtypes, alignments, tiles and warps. Nothing of a kernel's signature is repeated here.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
# Launch options that are not kernel arguments.
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch as its launcher asked for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@contextlib.contextmanager
def record_launches():
    """Note Triton launches instead of running them.

    Yields: a list that fills with a `Launch` for each launch made inside the block.
    """
    launches: list[Launch] = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append(
            Launch(kernel=kernel, grid=tuple(grid), arguments=dict(zip(kernel.arg_names, args, strict=False)) | kwargs)
        )

    original = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_launch(launch: Launch, target: str):
    """Compile a recorded launch for one of TARGETS.

    Returns: Triton's CompiledKernel; `.asm` holds every stage down to the machine code.
    """
    signature, constexprs, attrs = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        # Triton's own specialization: None and 1 become constants, multiples of 16 are known to be aligned.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[(index,)] = [["tt.divisibility", 16]]
    options = {name: launch.arguments[name] for name in _OPTIONS if name in launch.arguments}
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    return triton.compile(source, target=TARGETS[target], options=options)


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
