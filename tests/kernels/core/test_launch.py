"""launch_kernel must start the kernel that Triton would start."""

import itertools

import numpy as np
import pytest
import torch

from tritium.kernels.core import launch as module
from tritium.kernels.core.launch import launch_kernel
from tritium.kernels.core.layout import descriptor
from tritium.kernels.core.op import INTERPRET

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from tritium.kernels.core.triton import tl, triton

pytestmark = [
    pytest.mark.plain,
    pytest.mark.skipif(INTERPRET, reason="the interpreter does not specialize"),
]


@triton.jit
def plus(x):
    return x + 1


@triton.jit
def minus(x):
    return x - 1


@triton.jit(do_not_specialize=["P"])
def kernel(a, b_ptr, P, N, scale, FUNCTION: tl.constexpr, FLAG: tl.constexpr):
    pass


def argument_sets():
    """Arguments that differ in one or in several properties."""
    matrix = torch.empty(64, 64, dtype=torch.bfloat16)
    tensors = [
        matrix,
        matrix[1:],
        matrix[:, 1:],
        matrix.float(),
        torch.nn.Parameter(matrix.float()),
        descriptor(matrix, (16, 16)),
        descriptor(matrix, (16, 32)),
        descriptor(matrix.half(), (16, 16)),
        # More than 2 GB. NumPy does not touch the memory.
        torch.from_numpy(np.empty(2**31 + 2, np.uint8)).view(torch.bfloat16),
    ]
    integers = [0, 1, 2, 16, 17, 32, 2**31, 2**40, True]
    scales = [None, 1.0, 0.5, 1, True]
    # Each property takes all values with a few values of the others.
    for a, N in itertools.product(tensors, integers):
        for b_ptr, P, scale in ((None, 1, 1.0), (matrix, 16, None)):
            yield {"a": a, "b_ptr": b_ptr, "P": P, "N": N, "scale": scale, "FUNCTION": plus}
    for P, scale, function in itertools.product(integers, scales, (plus, minus)):
        yield {"a": matrix, "b_ptr": matrix, "P": P, "N": 8, "scale": scale, "FUNCTION": function}


@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)])
def test_equal_keys_have_equal_specializations(target, monkeypatch):
    monkeypatch.setattr(module, "_IS_AMD", target.backend == "hip")
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    found = {}
    count = 0
    for arguments in argument_sets():
        for FLAG, options in itertools.product(
            (0, 1, False, True), ({}, {"num_warps": 4}, {"num_warps": 8}, {"num_stages": 4})
        ):
            passed = {**arguments, "FLAG": FLAG, **options}
            bound, specialization, given_options = bind(**passed, debug=False)
            # Triton's own key, with the values of constants and their types.
            constants = [(type(bound[name]), bound[name]) for name in ("FUNCTION", "FLAG")]
            expected = repr((specialization, constants, sorted(given_options.items())))
            assert found.setdefault(module._key(kernel, passed), expected) == expected
            count += 1
    assert 100 < len(found) <= count


def test_keys_keep_no_tensor_alive():
    matrix = torch.empty(64, 64, dtype=torch.bfloat16)
    parts = module._key(kernel, {"a": descriptor(matrix, (16, 16)), "b_ptr": matrix, "N": 1})
    device = module._key(kernel, {"a": descriptor(matrix, (16, 16)), "b_ptr": None})[-1]
    assert device == matrix.device
    parameter = module._key(kernel, {"a": torch.nn.Parameter(matrix)})
    assert not any(isinstance(part, torch.Tensor) for part in (*parts, *parameter))


class Compiled(CompiledKernel):
    """A kernel that records its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


def test_a_second_launch_starts_the_compiled_kernel(monkeypatch):
    monkeypatch.setattr(module, "_COMPILED", {})
    runs = []
    compiled = Compiled()
    monkeypatch.setattr(type(kernel), "run", lambda _, **options: runs.append(options) or compiled)
    x, y = torch.empty(4), torch.empty(8)
    options = {"P": 2, "N": 3, "scale": 0.5, "FLAG": True, "FUNCTION": plus, "num_warps": 4}
    launch_kernel(kernel, (5,), b_ptr=None, a=x, **options)
    assert len(runs) == 1
    # Triton 3.10 changes the default.
    assert runs[0]["enable_fp_fusion"] is True
    launch_kernel(kernel, (6, 7), b_ptr=None, a=y, **options)
    assert len(runs) == 1
    # Arguments are in the order of the parameters. Options are parts of the compiled kernel.
    ((grid, args),) = compiled.launches
    assert grid == (6, 7, 1)
    assert args == (y, None, 2, 3, 0.5, plus, True)
    # Other arguments go to Triton.
    launch_kernel(kernel, (5,), b_ptr=None, a=x.half(), **options)
    launch_kernel(kernel, (5,), b_ptr=None, a=x[1:], **options)
    launch_kernel(kernel, (5,), b_ptr=None, a=x, **{**options, "num_warps": 8})
    launch_kernel(kernel, (5,), b_ptr=None, a=x.to("meta"), **options)
    assert len(runs) == 5


def test_recorded_launches_are_not_remembered(monkeypatch):
    """The bench records launches with a function that returns None."""
    monkeypatch.setattr(module, "_COMPILED", {})
    monkeypatch.setattr(type(kernel), "run", lambda _, **options: None)
    launch_kernel(kernel, (1,), a=torch.empty(1))
    assert not module._COMPILED


def test_the_number_of_compiled_kernels_is_limited(monkeypatch):
    monkeypatch.setattr(module, "_COMPILED", {})
    monkeypatch.setattr(module, "MAX_COMPILED", 2)
    monkeypatch.setattr(type(kernel), "run", lambda _, **options: Compiled())
    for N in range(5):
        launch_kernel(kernel, (1,), a=torch.empty(1), N=N)
        assert 1 <= len(module._COMPILED) <= 2
