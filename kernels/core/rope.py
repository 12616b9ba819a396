"""The tables of RoPE: checks and layout, shared by the operators that rotate."""

import torch
from torch import Tensor

from .layout import unit_stride


def check_tables(
    operator: str, cos: Tensor, sin: Tensor, pairs: int, x: Tensor, label: str
) -> None:
    """Raise a ValueError unless each table is (S, pairs) with S >= T, or (B, T, pairs).

    Only metadata is read, never a value.

    Args:
        operator: its name, for the messages.
        pairs: how many pairs of elements of a head are rotated.
        x: (B, T, ...), the tensor to rotate.
        label: the name of x, for the messages.
    """
    B, T = x.shape[:2]
    for name, table in (("cos", cos), ("sin", sin)):
        is_shared = table.ndim == 2 and table.shape[0] >= T and table.shape[1] == pairs
        is_per_token = table.shape == (B, T, pairs)
        if not (is_shared or is_per_token) or not table.is_floating_point():
            raise ValueError(
                f"{operator}: {name} must be floating point ({T} or more, {pairs}) or "
                f"({B}, {T}, {pairs}) to match {label} {tuple(x.shape)}, "
                f"got {table.dtype} {tuple(table.shape)}"
            )
        if table.device != x.device:
            raise ValueError(
                f"{operator}: {name} must be on {x.device} like {label}, got {table.device}; "
                "move it"
            )
        if table.requires_grad:
            raise ValueError(
                f"{operator}: {name} must not require a gradient, got one that does; detach it"
            )


def as_tables(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return tables that a kernel can read: a unit last stride, and no float64 unless x has it.

    Kernels take no float64. They compute in float32, so float64 tables gain nothing there.

    Args:
        dtype: that of the tensor to rotate.
    """
    if dtype != torch.float64:
        cos, sin = (x.float() if x.dtype == torch.float64 else x for x in (cos, sin))
    return unit_stride(cos), unit_stride(sin)
