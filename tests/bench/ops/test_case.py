"""Every operator of the bench: matching inputs, a correct definition, costs and implementations."""

import pytest
import torch

from tritium.bench.ops import OPERATORS
from tritium.bench.ops.case import Implementation
from tritium.bench.ops.check import find_error
from tritium.kernels import __all__ as public_names

pytestmark = pytest.mark.plain

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_that_runs_here_is_correct(name, dtype):
    operator = OPERATORS[name]
    shape = operator.small_shapes[-1]
    here = [one for one in operator.implementations() if one.why_missing(CPU) is None]
    assert [one.name for one in here[:2]] == ["tritium", "eager"]
    for one in here:
        assert find_error(operator, one, shape, dtype, CPU) is None, one.name


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_have_costs_and_smaller_shapes_to_check(name):
    operator = OPERATORS[name]
    assert name.partition(":")[0] in public_names
    assert operator.bound in ("bytes", "flops")
    inputs = operator.make_inputs(operator.small_shapes[0], torch.float32, CPU)
    # Operators for inference have no gradients.
    parts = ("fwd", "bwd") if any(x.requires_grad for x in inputs.values()) else ("fwd",)
    for shape in (*operator.shapes, *operator.small_shapes, *operator.launch_shapes):
        assert len(shape) == len(operator.sizes)
        cost = operator.cost(*shape, 2)
        bounds = {name for name in cost if name.endswith(operator.bound)}
        assert bounds == {f"{part}_{operator.bound}" for part in parts}
        assert all(value > 0 for value in cost.values())
        smaller = operator.check_shape(*shape)
        assert all(a <= b for a, b in zip(smaller, shape, strict=True))
    assert operator.label(operator.shapes[0]).startswith(f"{operator.sizes[0]}=")


def test_why_missing_names_the_library_or_the_gpu():
    def why_missing(**options):
        return Implementation(name="x", call=abs, **options).why_missing(CPU)

    assert why_missing(needs="no_such_library") == "no_such_library is not installed"
    assert why_missing(needs="torch", cuda_only=True) == "needs a GPU"
    assert why_missing(needs="torch") is None
