"""The cases of `tritium bench kernels` for pytest-benchmark: `pytest bench/ --benchmark-only`.

A group is an operator, a shape and a direction; its rows are the implementations. The clock
includes the host's time: for kernels under 200 us on a GPU use `tritium bench kernels`.

Imports are absolute: pytest gives this file a package name of its own, and relative imports would
register every operator twice.
"""

import itertools

import pytest
import torch

from tritium.bench.ops import OPERATORS
from tritium.bench.ops.check import find_error
from tritium.bench.ops.compare import directions_of, rotated_inputs, timed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = [
    pytest.param(
        operator,
        shape,
        implementation,
        direction,
        id=f"{operator.name}-{'x'.join(map(str, shape))}-{implementation.name}-{direction}",
    )
    for operator in OPERATORS.values()
    for shape in (operator.shapes if DEVICE.type == "cuda" else operator.small_shapes)
    for implementation in operator.implementations()
    for direction in directions_of(operator, shape)
]


@pytest.mark.parametrize(("operator", "shape", "implementation", "direction"), CASES)
def test_kernel(operator, shape, implementation, direction, benchmark):
    if why := implementation.why_missing(DEVICE):
        pytest.skip(why)
    assert find_error(operator, implementation, shape, DTYPE, DEVICE) is None
    benchmark.group = f"{operator.name} {operator.label(shape)} {direction}"
    call = timed(implementation.call, rotated_inputs(operator, shape, DTYPE, DEVICE), direction)
    numbers = itertools.count()

    def run_once():
        call(next(numbers))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    run_once()
    benchmark.pedantic(run_once, rounds=10, warmup_rounds=2)
