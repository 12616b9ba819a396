"""Compile the kernels ahead of time, for GPUs that need not be present.

Launchers run on meta tensors, and the launches they make are recorded instead of run. The compiled
kernel is therefore the one that a GPU would run, with the same dtypes, alignments, tiles
and warps. No kernel's signature is repeated here.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels.core import device as _device
from ...kernels.core.op import LAUNCHERS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# Arguments of every kernel, such as num_warps.
_OPTIONS = {
    name for target in TARGETS.values() for name in vars(make_backend(target).parse_options({}))
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel, with the arguments that its launcher passed."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class RunLaunchers(TorchDispatchMode):
    """Run the launchers of tritium's operators on any device, as they run on CUDA."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tritium":
            function = LAUNCHERS[function._opname]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def record_launches(arch: str) -> Iterator[list[Launch]]:
    """Record Triton launches instead of running them.

    Args:
        arch: the architecture that launchers plan for, one of TARGETS.
    Yields: a list to which each launch inside the block appends a `Launch`.
    Raises: KeyError, as Triton does, for an argument that the kernel does not have.
    """
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        if unknown := kwargs.keys() - _OPTIONS - set(kernel.arg_names):
            raise KeyError(f"{kernel.__name__}: unknown argument {', '.join(sorted(unknown))}")
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for name, value in arguments.items():
            # A launcher may change the block of a descriptor for its next launch.
            if isinstance(value, TensorDescriptor):
                arguments[name] = copy.copy(value)
        sizes = grid(arguments) if callable(grid) else grid
        launches.append(Launch(kernel=kernel, grid=tuple(sizes), arguments=arguments))

    original, default = JITFunction.run, _device.DEFAULT_ARCH
    JITFunction.run, _device.DEFAULT_ARCH = record, arch
    try:
        yield launches
    finally:
        JITFunction.run, _device.DEFAULT_ARCH = original, default


def compile_launch(launch: Launch, target: str):
    """Compile a recorded launch.

    Args:
        target: one of TARGETS.
    Returns: Triton's CompiledKernel. `.asm` holds every stage down to the machine code.
    """
    parameters = launch.kernel.params
    signature, constexprs, attrs = {}, {}, {}
    # After the loop only options such as num_warps are left. Each backend ignores those of others.
    options = {
        parameter.name: parameter.default for parameter in parameters if parameter.has_default
    }
    options |= launch.arguments
    for index, parameter in enumerate(parameters):
        value = options.pop(parameter.name)
        # Triton's own specialization: None and 1 become constants, multiples of 16 are aligned.
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
            continue
        signature[parameter.name] = mangle_type(value)
        fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not fixed and _is_aligned(value):
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    return triton.compile(source, target=TARGETS[target], options=options)


def _is_aligned(value) -> bool:
    return isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
