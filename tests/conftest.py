"""Settings every test runs under."""

import os
from dataclasses import replace

# The suite runs on one process a core. More threads each, here or in the programs that tests start, would wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

from tritium.kernels.core.op import INTERPRET

# Fills torch.empty with NaN, so that an output a kernel forgot to write shows.
torch.use_deterministic_algorithms(True)


def _round_to_bfloat16_like_a_gpu() -> None:
    """Triton's interpreter cuts float32 off to bfloat16; GPUs, and the error bars here, round to the nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if not (source == tl.float32 and target == tl.bfloat16):
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # Rounding up a NaN's mantissa would make an infinity, or wrap around to zero.
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)

    interpreter._convert_float = rounding


def _multiply_bfloat16_like_a_gpu() -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers; and float16 without a BLAS."""
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def in_float32(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(
                (handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32
            )
        return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)

    def multiply(self, a, b, *rest):
        return create_dot(self, in_float32(a), in_float32(b), *rest)

    interpreter.InterpreterBuilder.create_dot = multiply


def _leave_out_what_comes_to_nothing() -> None:
    """Half of the time of Triton's interpreter goes into what it does anew at each operation or call, to no effect."""
    import triton.language as tl
    from triton.runtime import interpreter

    # It looks for overflows of integers, but tells of them only in a mode for debugging that cannot be chosen.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    numpy_dtypes, numpy_dtype = {}, interpreter._get_np_dtype

    def known_numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in numpy_dtypes:
            numpy_dtypes[name] = numpy_dtype(dtype)
        return numpy_dtypes[name]

    some_builtin, patch = {}, interpreter._patch_builtin

    def patch_once(package, builder, scope):
        """A function that a kernel calls finds the language as the launch of the kernel has patched it."""
        name = some_builtin.get(package)
        if name and not tl.core.is_builtin(getattr(package, name)):
            return
        some_builtin[package] = next(
            (name for name, member in vars(package).items() if tl.core.is_builtin(member)), None
        )
        patch(package, builder, scope)

    interpreter._get_np_dtype, interpreter._patch_builtin = known_numpy_dtype, patch_once


if INTERPRET:
    _leave_out_what_comes_to_nothing()
    _round_to_bfloat16_like_a_gpu()
    _multiply_bfloat16_like_a_gpu()


DTYPE_IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "plain: says nothing about kernels, so the run under TRITON_INTERPRET=1 leaves it out",
    )
    config.addinivalue_line(
        "markers", "codegen: compiles kernels ahead of time, with whichever Triton is installed"
    )


def pytest_make_parametrize_id(val):
    """Dtypes by name, so that -k can choose among them."""
    return DTYPE_IDS.get(val) if isinstance(val, torch.dtype) else None


def pytest_collection_modifyitems(config, items):
    """Under the interpreter only what reaches a kernel is run: the plain run has covered the rest."""
    if not INTERPRET:
        return
    left_out = [
        item
        for item in items
        if item.get_closest_marker("plain") or item.get_closest_marker("codegen")
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
