"""Launch a kernel with less work on the host than `kernel[grid](...)`.

At each launch Triton computes the specialization of all arguments: their types, their alignment,
and which integers are 1. `launch_kernel` looks up the compiled kernel by a key that takes half of
the time. Arguments with equal keys have equal specializations.
"""

from typing import Any

import torch
from torch import Tensor

from .triton import HAS_TRITON, TensorDescriptor

if HAS_TRITON:
    from triton.compiler import CompiledKernel

# Compiled kernels by `_key`. Sizes are parts of the key: the limit is for programs that launch
# kernels with ever new sizes.
_COMPILED: dict[tuple, Any] = {}
MAX_COMPILED = 10_000
# Options of every launch. Multiply-adds are fused; Triton 3.10 no longer does this by default.
OPTIONS = {"enable_fp_fusion": True}
_IS_AMD = torch.version.hip is not None


def launch_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch `kernel` on the current GPU, as `kernel[grid](**arguments)`.

    Args:
        kernel: function decorated with triton.jit.
        grid: number of programs along up to three axes.
        arguments: an argument for each parameter of the kernel, and options such as num_warps. At
            least one is a tensor or a descriptor.
    """
    key = _key(kernel, arguments)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])
        return
    compiled = kernel[grid](**arguments, **OPTIONS)
    # Triton's interpreter returns None.
    if isinstance(compiled, CompiledKernel):
        if len(_COMPILED) >= MAX_COMPILED:
            _COMPILED.clear()
        _COMPILED[key] = compiled


def _key(kernel: Any, arguments: dict[str, Any]) -> tuple:
    """Return all that a compiled kernel depends on. It must not keep tensors alive."""
    # The first part of an entry tells how many parts the entry has.
    key = [kernel.fn, tuple(arguments)]
    add = key.append
    tensor = None
    for value in arguments.values():
        type_ = type(value)
        if value is None or type_ is int:
            add(value)
        elif type_ is Tensor or isinstance(value, Tensor):
            tensor = value
            add(value.dtype)
            add(value.data_ptr() % 16 == 0)
            if _IS_AMD:
                # A kernel for tensors of up to 2 GB uses instructions with 32-bit offsets.
                add(value.untyped_storage().size() < 2**31)
        elif type_ is TensorDescriptor:
            tensor = value.base
            add(tuple(value.block_shape))
            add(tensor.dtype)
        else:
            # The type, because True equals 1 and 1.0.
            add(type_)
            add(value)
    add(tensor.device)
    return tuple(key)
