"""Settings of all tests, and repairs of Triton's interpreter (TRITON_INTERPRET=1)."""

import math
import os
import re
from dataclasses import replace

# The suite runs one process per core. More threads per process, or in programs that tests start,
# would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# cuBLAS is deterministic only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tritium.bench.interpreter import repair_dot_of_16_bits, repair_rounding_to_bfloat16
from tritium.kernels.core.op import INTERPRET

# Fill torch.empty with NaN: an output that a kernel does not write becomes visible. Only warn where
# PyTorch has no deterministic algorithm: on a GPU a reference may need such an operator.
torch.use_deterministic_algorithms(True, warn_only=True)


def _repair_blocks_of_comparisons() -> None:
    """Keep a comparison of scalars boolean when it becomes a block.

    The interpreter makes integers of it, and Triton 3.9 reads no mask of integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    create_splat = interpreter.InterpreterBuilder.create_splat

    def create_boolean_splat(self, type, arg):
        handle = create_splat(self, type, arg)
        if type.scalar != tl.int1:
            return handle
        return interpreter.TensorHandle(handle.data.astype(bool), tl.int1)

    interpreter.InterpreterBuilder.create_splat = create_boolean_splat


def _repair_repeated_work() -> None:
    """Skip work without effect that the interpreter repeats. It takes half of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    # Checks for integer overflow. They report only in a debug mode that the interpreter cannot
    # enter.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    # A table of dtypes that is built again for each operation.
    numpy_dtypes = {}
    numpy_dtype = interpreter._get_np_dtype

    def cached_numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in numpy_dtypes:
            numpy_dtypes[name] = numpy_dtype(dtype)
        return numpy_dtypes[name]

    interpreter._get_np_dtype = cached_numpy_dtype

    # The interpreter patches triton.language again for each function that a kernel calls. A patch
    # replaces the builtins. So if the first builtin is replaced, the patch is applied already.
    first_builtins = {}
    patch = interpreter._patch_builtin

    def patch_once(package, builder, scope):
        name = first_builtins.get(package)
        if name and not tl.core.is_builtin(getattr(package, name)):
            return
        first_builtins[package] = next(
            (name for name, member in vars(package).items() if tl.core.is_builtin(member)), None
        )
        patch(package, builder, scope)

    interpreter._patch_builtin = patch_once


def _repair_repeated_types() -> None:
    """Describe each shape once. The interpreter describes the shape of each tensor again.

    That takes a third of its time.
    """
    import triton.language as tl

    # Sizes of a block -> shape and number of elements, of a block type and of a tensor.
    of_types, of_tensors = {}, {}
    make_type = tl.block_type.__init__

    def init_type(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if sizes not in of_types:
            make_type(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel
            of_tensors[sizes] = describe(sizes)
        self.element_ty = element_ty
        self.shape, self.numel = of_types[sizes]
        self.of_tensor = of_tensors[sizes]

    def describe(sizes):
        return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def init_tensor(self, handle, type):
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape, self.numel = type.of_tensor if type.is_block() else of_scalar

    of_scalar = describe(())
    tl.block_type.__init__ = init_type
    # Only messages have it.
    tl.block_type.name = property(
        lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None
    )
    tl.tensor.__init__ = init_tensor


def _repair_repeated_patches() -> None:
    """Patch triton.language once per kernel and module, not again for each function it calls."""
    from triton.runtime import interpreter

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # modules whose functions can run in the current kernel

    def patch_once(function):
        module = function.__module__
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    def call_with_patches(self, *arguments, **options):
        patched.clear()
        call(self, *arguments, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = call_with_patches


if INTERPRET:
    _repair_repeated_work()
    _repair_repeated_types()
    _repair_repeated_patches()
    repair_rounding_to_bfloat16()
    repair_dot_of_16_bits()
    _repair_blocks_of_comparisons()


DTYPE_IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "plain: runs no kernel, so the run under TRITON_INTERPRET=1 skips it",
    )
    config.addinivalue_line(
        "markers", "codegen: compiles kernels ahead of time, with whichever Triton is installed"
    )
    config.addinivalue_line(
        "markers", "slow: left out unless `-m` is given; `.ci/all` runs every slow test"
    )


def pytest_make_parametrize_id(val):
    """Name dtypes in test ids, so that -k can select them."""
    return DTYPE_IDS.get(val) if isinstance(val, torch.dtype) else None


def pytest_ignore_collect(collection_path):
    """Under the interpreter, do not import files without kernels: the imports take seconds."""
    if not INTERPRET or collection_path.suffix != ".py":
        return None
    source = collection_path.read_text(encoding="utf-8")
    return bool(re.search(r"^pytestmark = pytest\.mark\.(plain|codegen)$", source, re.M)) or None


@pytest.hookimpl(tryfirst=True)  # before pytest reads the markers
def pytest_collection_modifyitems(config, items):
    """Mark slow tests. Under the interpreter select only tests that run kernels."""
    for item in items:
        if _repeats_another(item):
            item.add_marker("slow")
    if not INTERPRET:
        return
    selected, deselected = [], []
    for item in items:
        is_skipped = item.get_closest_marker("plain") or item.get_closest_marker("codegen")
        (deselected if is_skipped else selected).append(item)
    config.hook.pytest_deselected(items=deselected)
    items[:] = selected


def _repeats_another(item) -> bool:
    """Whether a test differs from another only in its GPU architecture or in its 16-bit dtype.

    The short runs compile for sm_90, and interpret kernels in float32 and bfloat16.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if item.get_closest_marker("codegen"):
        return parameters.get("arch", "sm_90") != "sm_90"
    return INTERPRET and any(value is torch.float16 for value in parameters.values())


@pytest.fixture
def device() -> torch.device:
    """The device on which kernels are tested: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
