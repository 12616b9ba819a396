"""Check the shapes of the tensors in a checkpoint."""

from pathlib import Path

from ...errors import InputError

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


def check_weight_shapes(place: Path, found: Shapes, expected: Shapes) -> None:
    """Raise InputError unless the weights at `place` have the names and shapes of the model's."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise _another_model(place, name, expected.get(name), found.get(name))


def check_state_shapes(place: Path, found: Shapes, weights: Shapes) -> None:
    """Raise InputError unless each PARAMETER.KEY in `found` fits a parameter of the model.

    Moments have the shape of the parameter. The step is a single number.
    """
    for name, shape in found.items():
        expected = weights.get(name.rpartition(".")[0])
        if shape not in ((), expected):
            raise _another_model(place, name, expected, shape)


def _another_model(place: Path, name: str, expected: object, found: object) -> InputError:
    return InputError(
        f"{place}: expected {name} of shape {expected}, got {found}; it belongs to another model"
    )
