"""Checks of the tensors of cross_entropy and linear_cross_entropy."""

import torch
from torch import Tensor

from ..core.matmul import check_x
from ..core.op import can_read_values


def check_linear(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int | None
) -> None:
    """Raise a ValueError unless x, weight and bias are those of a linear layer.

    `vocab_size` is the number of rows of weight that are not padding, or None.
    """
    check_x(name, x)
    D = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != D:
        raise ValueError(
            f"{name}: weight must have shape (V, {D}) with V at least 1 to match x "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}; pass it as nn.Linear stores it"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: bias must have shape ({weight.shape[0]},) to match weight "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    allowed = [x.dtype, torch.float32] if x.dtype.itemsize == 2 else [x.dtype]
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in allowed:
            raise ValueError(
                f"{name}: {label} must be {' or '.join(map(str, allowed))} to match x, "
                f"got {tensor.dtype}; convert it, or use torch.autocast"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{name}: {label} must be on {x.device} like x, got {tensor.device}; move it"
            )
    if vocab_size is not None and not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(
            f"{name}: vocab_size must be from 1 to {weight.shape[0]}, the rows of weight, "
            f"got {vocab_size}"
        )


def check_target(name: str, label: str, values: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raise unless `target` holds one class index for each row of `values`, named `label`.

    The values of the target are not read.
    """
    if target.shape != values.shape[:-1]:
        raise ValueError(
            f"{name}: target must have shape {tuple(values.shape[:-1])} to match {label} "
            f"{tuple(values.shape)}, got {tuple(target.shape)}; pass one class index for each row"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: target must be int64 or int32 class indices, got {target.dtype}; cast it"
        )
    if target.device != values.device:
        raise ValueError(
            f"{name}: target must be on {values.device} like {label}, got {target.device}; move it"
        )
    limits = torch.iinfo(target.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(
            f"{name}: ignore_index must fit in the target's dtype {target.dtype}, "
            f"got {ignore_index}; use int64 targets"
        )


def check_target_values(name: str, target: Tensor, V: int, ignore_index: int) -> None:
    """Raise an IndexError for a target that is neither a column nor ignore_index.

    Does nothing on devices whose values cannot be read without a synchronization.
    """
    if not can_read_values(target):
        return
    outside = (target != ignore_index) & ((target < 0) | (target >= V))
    if outside.any():
        bad = target[outside]
        more = f" and {bad.numel() - 1} more" if bad.numel() > 1 else ""
        raise IndexError(
            f"{name}: target must be from 0 to {V - 1} or ignore_index ({ignore_index}), "
            f"got {bad[0].item()}{more}; check the vocabulary size"
        )
