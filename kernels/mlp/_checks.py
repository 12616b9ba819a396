"""Checks of the arguments of linear and of the MLPs."""

from collections.abc import Iterable

from torch import Tensor

from ...errors import unknown_name


def check_choice(name: str, option: str, value: str, known: Iterable[str]) -> None:
    """Raise a ValueError unless the value of an option is in `known`."""
    if value not in known:
        raise ValueError(f"{name}: {unknown_name(option, value, known)}")


def check_parameter(
    name: str, label: str, parameter: Tensor | None, shape: tuple, x: Tensor
) -> None:
    """Raise a ValueError unless a parameter has this shape and matches the dtype and device of x.

    A letter in `shape` stands for any size of at least 1.
    """
    if parameter is None:
        return
    fits = len(shape) == parameter.ndim and all(
        size >= 1 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(parameter.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(
            f"{name}: {label} must have shape ({expected}) to match x {tuple(x.shape)}, "
            f"got {tuple(parameter.shape)}; pass weights as nn.Linear stores them"
        )
    if parameter.dtype != x.dtype or parameter.device != x.device:
        raise ValueError(
            f"{name}: {label} must be {x.dtype} on {x.device} like x, "
            f"got {parameter.dtype} on {parameter.device}; convert it, or use torch.autocast"
        )
