"""The reference of linear_cross_entropy: its definition in PyTorch, and the shapes of its outputs.

linear_cross_entropy.py gives math, shapes and precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.layout import wide
from ._checks import check_target_values
from .block_loss import (
    apply_weights,
    block_dlogits,
    block_loss,
    cap_logits,
    is_correct,
    reduce_losses,
    row_blocks,
    row_weights,
)
from .chunks import block_rows
from .options import LossOptions


def reference_fwd(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    vocab_size: int,
    want_dx: bool,
    want_dw: bool,
    want_lse: bool,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, its divisor, dx, dw and db of the sum of all row losses, lse, and correct.

    lse and correct have one element per row, as in cross_entropy. Results that are not wanted are
    empty; `want_dw` asks for dw and db.
    """
    check_target_values("linear_cross_entropy", target, vocab_size, options.ignore_index)
    dtype = torch.promote_types(x.dtype, torch.float32)
    index, row_weight = row_weights(target, vocab_size, options.ignore_index, dtype)
    grads = empty_gradients(x, weight, bias, want_dx, want_dw)
    rows = empty_rows(x, want_lse, want_correct)
    loss = _reference_blocks(x, weight, bias, index, row_weight, options, vocab_size, grads, rows)
    return *reduce_losses(loss, row_weight, options.reduction), *grads, *rows


def reference_scale(
    dloss: Tensor,
    divisor: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply the gradients of the forward by dloss / divisor. dw and db get `weight_dtype`."""
    scale = dloss / divisor
    return (
        (wide(dx) * scale).to(dx.dtype),
        (dw * scale).to(weight_dtype),
        (db * scale).to(weight_dtype),
    )


def reference_rows_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    vocab_size: int,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dw and db for dloss (N,), computing the logits again."""
    index, row_weight = row_weights(target, vocab_size, options.ignore_index, dloss.dtype)
    scale = apply_weights(dloss, row_weight)
    dx, dw, db = empty_gradients(x, weight, bias, want_dx, want_dw)
    _reference_blocks(x, weight, bias, index, scale, options, vocab_size, (dx, dw, db))
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


def _reference_blocks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scale: Tensor,
    options: LossOptions,
    V: int,
    grads: tuple[Tensor, Tensor, Tensor],
    rows_out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the row losses. Write the gradients of sum_n scale_n l_n to `grads`, unless empty.

    Write lse and correct to `rows_out`, unless they are empty.
    """
    N = x.shape[0]
    loss = torch.empty_like(scale)
    dx, dw, db = grads
    lse, correct = rows_out or empty_rows(x, False, False)
    dw.zero_()
    db.zero_()
    wide_weight = wide(weight[:V].to(x.dtype))
    wide_bias = None if bias is None else wide(bias[:V].to(x.dtype))
    for rows in row_blocks(N, block_rows(N, V)):
        # the loss of the block
        wide_x = wide(x[rows])
        s = cap_logits(F.linear(wide_x, wide_weight, wide_bias), options.softcap)
        loss[rows], top, log_sum, p = block_loss(s, index[rows], options)
        if lse.numel():
            lse[rows] = top + log_sum
        if correct.numel():
            correct[rows] = is_correct(s, index[rows], scale[rows], top)
        if not any(grad.numel() for grad in grads):
            continue
        # its gradients
        dlogits = block_dlogits(p, s, index[rows], top + log_sum, scale[rows], options)
        if dx.numel():
            if dx.dtype == dlogits.dtype:
                torch.mm(dlogits, wide_weight, out=dx[rows])
            else:
                dx[rows] = dlogits @ wide_weight
        if dw.numel():
            dw[:V].addmm_(dlogits.t(), wide_x)
        if db.numel():
            db[:V] += dlogits.sum(0)
    return loss


def shapes_fwd(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    vocab_size: int,
    want_dx: bool,
    want_dw: bool,
    want_lse: bool,
    want_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the outputs of `reference_fwd`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(x.shape[0] if options.reduction == "none" else (), dtype=dtype)
    divisor = x.new_empty((), dtype=torch.int64)
    grads = empty_gradients(x, weight, bias, want_dx, want_dw)
    return loss, divisor, *grads, *empty_rows(x, want_lse, want_correct)


def shapes_rows_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    vocab_size: int,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the outputs of `reference_rows_bwd`."""
    dx, dw, db = empty_gradients(x, weight, bias, want_dx, want_dw)
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


def empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, want_dx: bool, want_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate dx in the dtype of x, dw and db in float32 or wider; empty if not wanted."""
    sums = torch.promote_types(x.dtype, torch.float32)
    want_db = want_dw and bias is not None
    return (
        x.new_empty(x.shape if want_dx else 0),
        x.new_empty(weight.shape if want_dw else 0, dtype=sums),
        x.new_empty(weight.shape[0] if want_db else 0, dtype=sums),
    )


def empty_rows(x: Tensor, want_lse: bool, want_correct: bool) -> tuple[Tensor, Tensor]:
    """Allocate lse (N,), in float32 or wider, and correct (N,) bool; empty if not wanted."""
    N = x.shape[0]
    return (
        x.new_empty(N if want_lse else 0, dtype=torch.promote_types(x.dtype, torch.float32)),
        x.new_empty(N if want_correct else 0, dtype=torch.bool),
    )
