"""The cases of `tritium bench kernels` under pytest-benchmark: `pytest bench/ --benchmark-only`, with its --benchmark-save,
--benchmark-compare and --benchmark-histogram. A group is an operator, a shape and a direction; contestants stand in it.

Imported absolutely: pytest gives this file a package name of its own, and relative imports would load every operator twice.
"""

import itertools

import pytest
import torch

from tritium.bench.ops import OPERATORS
from tritium.bench.ops.compare import directions_of, refusal, rotated_inputs, timed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = [
    pytest.param(
        operator,
        shape,
        contestant,
        direction,
        id=f"{operator.name}-{'x'.join(map(str, shape))}-{contestant.name}-{direction}",
    )
    for operator in OPERATORS.values()
    for shape in (operator.shapes if DEVICE.type == "cuda" else operator.small_shapes)
    for contestant in operator.contestants()
    for direction in directions_of(operator, shape)
]


@pytest.mark.parametrize(("operator", "shape", "contestant", "direction"), CASES)
def test_kernel(operator, shape, contestant, direction, benchmark):
    if why := contestant.absence(DEVICE):
        pytest.skip(why)
    assert refusal(operator, contestant, shape, DTYPE, DEVICE) is None
    benchmark.group = f"{operator.name} {operator.label(shape)} {direction}"
    call = timed(contestant.call, rotated_inputs(operator, shape, DTYPE, DEVICE), direction)
    turn = itertools.count()

    def once():
        call(next(turn))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    once()
    benchmark.pedantic(once, rounds=10, warmup_rounds=2)
