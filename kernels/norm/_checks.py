"""Argument checks of layer_norm and rms_norm."""

import torch
from torch import Tensor

MAX_WIDTH = 65_536


def check(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    bias: Tensor | None = None,
    added_bias: Tensor | None = None,
) -> float:
    """Return eps as a float, after the checks: an int over 64 bits fits no argument of a kernel.

    Raise a ValueError unless x has rows of a supported width that all vectors match. None as a
    weight, bias or added_bias is valid here.
    """
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{name}: x must be (..., N) with N from 1 to {MAX_WIDTH}, "
            f"got {tuple(x.shape)}; reshape it"
        )
    if not x.is_floating_point():
        raise ValueError(f"{name}: x must be floating point, got {x.dtype}; cast it")
    if not eps >= 0:
        raise ValueError(f"{name}: eps must be at least 0, got {eps}")
    for label, vector in (("weight", weight), ("bias", bias), ("added_bias", added_bias)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: {label} must have shape ({x.shape[-1]},) to match x {tuple(x.shape)}, "
                f"got {tuple(vector.shape)}"
            )
        if vector.device != x.device:
            raise ValueError(
                f"{name}: {label} must be on {x.device} like x, got {vector.device}; move it"
            )
        if not vector.is_floating_point():
            raise ValueError(f"{name}: {label} must be floating point, got {vector.dtype}; cast it")
    return torch.sym_float(eps)  # keeps a symbolic eps of torch.compile


def check_residual(name: str, x: Tensor, residual: Tensor) -> None:
    """Raise a ValueError unless residual has the shape and the device of x."""
    if residual.shape != x.shape or residual.device != x.device or not residual.is_floating_point():
        raise ValueError(
            f"{name}: residual must be floating point, {tuple(x.shape)} on {x.device} like x, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )
