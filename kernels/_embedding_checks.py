"""Checks of the arguments of embedding."""

import torch
from torch import Tensor

from .core.op import FLOATS, can_read_values


def check_arguments(
    tokens: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_weight: Tensor | None,
    order: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    """Raise a ValueError unless the tensors match. Only metadata is read, never a value."""
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(
            "embedding: weight must be floating point (V, D) with V and D at least 1, "
            f"got {_describe(weight)}"
        )
    shape = tuple(tokens.shape)
    for name, index, shapes in (
        ("tokens", tokens, (shape,)),
        ("position", position, (shape[-1:], shape)),
        ("order", order, ((tokens.numel(),),)),
    ):
        if index is not None and (
            index.dtype not in (torch.int64, torch.int32)
            or tuple(index.shape) not in shapes
            or index.device != weight.device
        ):
            expected = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ValueError(
                f"embedding: {name} must be int64 or int32 {expected} on {weight.device}, "
                f"got {_describe(index)}"
            )
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(
            f"embedding: dtype must be one of float32, bfloat16, float16 and float64, got {dtype}"
        )
    if position_weight is None:
        if position is not None:
            raise ValueError("embedding: position needs position_weight, got none")
        return
    rows = 1 if position is not None else shape[-1] if shape else 1
    D = weight.shape[1]
    table = position_weight
    if (
        table.ndim != 2
        or table.shape[0] < rows
        or table.shape[1] != D
        or ((table.dtype, table.device) != (weight.dtype, weight.device))
    ):
        raise ValueError(
            f"embedding: position_weight must be {weight.dtype} ({rows} or more, {D}) on "
            f"{weight.device}, got {_describe(table)}"
        )


def check_values(name: str, index: Tensor, table: Tensor) -> None:
    """Raise an IndexError for an index outside the table, if values can be read without waiting."""
    if not can_read_values(index):
        return
    rows = table.shape[0]
    outside = (index < 0) | (index >= rows)
    if outside.any():
        raise IndexError(
            f"embedding: {name} must be from 0 to {rows - 1}, got {index[outside][0].item()}; "
            "check the size of the table"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
