"""Every row of bench/kernels: inputs that fit, a definition that ours agrees with, costs, and names for what is absent."""

import pytest
import torch

from tritium.bench.ops import OPERATORS
from tritium.bench.ops.case import Contestant
from tritium.bench.ops.compare import refusal
from tritium.kernels import __all__ as public

CPU = torch.device("cpu")


@pytest.mark.plain
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contestant_here_is_right(name, dtype):
    operator = OPERATORS[name]
    here = [contestant for contestant in operator.contestants() if contestant.absence(CPU) is None]
    assert here[0].name == "tritium"
    assert here[1].name == "eager"
    for contestant in here:
        assert refusal(operator, contestant, operator.small_shapes[-1], dtype, CPU) is None, (
            contestant.name
        )


@pytest.mark.plain
@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_and_costs(name):
    operator = OPERATORS[name]
    assert name in public
    assert operator.bound in ("bytes", "flops")
    made = operator.inputs(operator.small_shapes[0], torch.float32, CPU)
    for shape in (*operator.shapes, *operator.small_shapes):
        assert len(shape) == len(operator.sizes)
        cost = operator.cost(shape, 2)
        # What is for inference alone has no gradients to form.
        parts = ("fwd", "bwd") if any(x.requires_grad for x in made.values()) else ("fwd",)
        assert {name for name in cost if name.endswith(operator.bound)} == {
            f"{part}_{operator.bound}" for part in parts
        }
        assert all(value > 0 for value in cost.values())
        smaller = operator.check_shape(shape)
        assert all(a <= b for a, b in zip(smaller, shape, strict=True))
    assert operator.label(operator.shapes[0]).startswith(f"{operator.sizes[0]}=")


@pytest.mark.plain
def test_what_cannot_take_part_says_why():
    assert (
        Contestant(name="x", call=abs, needs="no_such_library").absence(CPU)
        == "no_such_library is not installed"
    )
    assert (
        Contestant(name="x", call=abs, needs="torch", cuda_only=True).absence(CPU) == "needs a GPU"
    )
    assert Contestant(name="x", call=abs, needs="torch").absence(CPU) is None
