"""What layer_norm and rms_norm refuse."""

from torch import Tensor

MAX_WIDTH = 65_536


def check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Refuse rows too wide, and a weight or bias that does not match them."""
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{name}: x must be (..., N) with N from 1 to {MAX_WIDTH}, got {tuple(x.shape)}; reshape it"
        )
    for label, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: {label} must be ({x.shape[-1]},) to match x {tuple(x.shape)}, got {tuple(vector.shape)}; "
                "pass one value for each element of the last axis"
            )
        if vector.device != x.device:
            raise ValueError(
                f"{name}: {label} must be on {x.device} like x, got {vector.device}; move it"
            )
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(
            f"{name}: bias must be {weight.dtype} like weight, got {bias.dtype}; cast it"
        )
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"{name}: x and weight must be floating point, got {x.dtype} and {weight.dtype}; cast them"
        )


def check_residual(name: str, x: Tensor, residual: Tensor) -> None:
    """Refuse a residual that cannot be added to x element by element."""
    if residual.shape != x.shape or residual.device != x.device or not residual.is_floating_point():
        raise ValueError(
            f"{name}: residual must be floating point, {tuple(x.shape)} on {x.device} like x, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )
