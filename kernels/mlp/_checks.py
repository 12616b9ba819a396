"""What linear, gelu_mlp and swiglu_mlp refuse."""

from torch import Tensor


def check_x(name: str, x: Tensor) -> None:
    """Refuse what has no last axis of floating-point numbers."""
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"{name}: x must be floating point (..., D) with D at least 1, got {x.dtype} {tuple(x.shape)}"
        )


def check_parameter(
    name: str, label: str, parameter: Tensor | None, shape: tuple, x: Tensor
) -> None:
    """Refuse a parameter that does not match x; `shape` holds sizes, and a letter where any size from 1 will do."""
    if parameter is None:
        return
    fits = len(shape) == parameter.ndim and all(
        size >= 1 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(parameter.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(
            f"{name}: {label} must be ({expected}) to match x {tuple(x.shape)}, got {tuple(parameter.shape)}; "
            "pass weights as nn.Linear stores them"
        )
    if parameter.dtype != x.dtype or parameter.device != x.device:
        raise ValueError(
            f"{name}: {label} must be {x.dtype} on {x.device} like x, got {parameter.dtype} on {parameter.device}; "
            "convert it, or use torch.autocast"
        )
