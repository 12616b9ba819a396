"""Embedding of tokens: lookup, addition of learned positions, dropout, and cast.

    forward    y[n] = z[n] (weight[token[n]] + position_weight[position[n]])
    backward   dweight[v] = sum of z[n] dy[n] over all n with token[n] = v; the same for
               position_weight
    dropout    z = kept / (1 - dropout_p), from core/dropout.py; z = 1 without dropout

Order      The backward takes the tokens in sorted order. A run is a group of equal tokens. One
           program sums the rows of dy of a run, always in the same order and without atomics: the
           gradient is deterministic. The sort is stable, so a data loader can compute the same
           order on the host.
Long runs  The sorted tokens are divided into pieces. A run that crosses into the next piece leaves
           a partial sum per piece. A second kernel adds these sums.
Shapes     tokens, position, order: (N,)   weight: (V, D)   position_weight: (C, D)   y, dy: (N, D)
           Without `position`, token n has position n mod T: sequences of T tokens. Then
           dposition_weight is a sum over sequences. Without dropout PyTorch computes it.
Head       A head can share the weight. Then its gradient comes first, and the backward adds to it
           in place: see return_weight.
Precision  any float dtype in and out; sums in float32
Invalid    On a GPU, a token outside [0, V) or a position outside [0, C) makes the row of y NaN
           and adds nothing to the gradient of its table. CPUs raise IndexError.
Cost       memory-bound; cost() gives bytes. Estimates for N = 65,536, D = 768, V = 50,304, float32
           weights, 16-bit y and sequences of 1,024 tokens on an H200 (4.8 TB/s):
             forward    6 N D = 302 MB, 63 us. PyTorch's two lookups, addition and cast move
                        22 N D = 1,107 MB, 231 us
             backward   2 N D for each table = 201 MB; 4 V D = 155 MB to fill dweight with zeros; at
                        most 155 MB for the rows with tokens: 74 to 107 us
             with the gradient of a head: 201 MB, and at most 309 MB for the rows with tokens: 42 to
                        106 us
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._embedding_checks import check_arguments, check_values
from ._embedding_kernels import (
    _embedding_bwd_kernel,
    _embedding_bwd_long_runs_kernel,
    _embedding_fwd_kernel,
)
from .core.dropout import Dropout, drop, resolve_dropout
from .core.launch import launch_kernel
from .core.layout import as_rows, wide
from .core.op import define_op, is_eager, is_transformed, public
from .core.triton import cdiv, next_power_of_2

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    tokens: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_weight: Tensor | None,
    order: Tensor | None,
    T: int,
    dtype: torch.dtype,
    dropout: Dropout,
) -> Tensor:
    """Return y. `order` is for the backward."""
    check_values("tokens", tokens, weight)
    y = wide(weight)[tokens]
    if position_weight is not None:
        if position is None:
            position = torch.arange(tokens.shape[0], device=tokens.device) % T
        check_values("position", position, position_weight)
        y = y + wide(position_weight)[position]
    return drop(y, dropout).to(dtype)


def shapes_fwd(
    tokens: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_weight: Tensor | None,
    order: Tensor | None,
    T: int,
    dtype: torch.dtype,
    dropout: Dropout,
) -> Tensor:
    """Allocate the output of `reference_fwd`, which reads values."""
    return weight.new_empty((tokens.shape[0], weight.shape[1]), dtype=dtype)


def reference_bwd(
    dy: Tensor,
    tokens: Tensor,
    order: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    dropout: Dropout,
) -> Tensor:
    """Return dweight (rows, D)."""
    # On a CPU it adds the rows of dy in their order. It needs no sorted tokens.
    dy = drop(wide(dy), dropout)
    dweight = torch.ops.aten.embedding_dense_backward(dy, tokens, rows, -1, False)
    return dweight.to(dtype)


def reference_add(
    dweight: Tensor, dy: Tensor, tokens: Tensor, order: Tensor | None, dropout: Dropout
) -> None:
    """Add the gradient of the weight to `dweight` (V, D), in place."""
    dweight += reference_bwd(dy, tokens, order, dweight.shape[0], dweight.dtype, dropout)


def _composite_fwd(
    tokens: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_weight: Tensor | None,
    order: Tensor | None,
    T: int,
    dtype: torch.dtype,
    dropout: Dropout,
) -> Tensor:
    """Compute y with PyTorch functions that autograd can differentiate."""
    check_values("tokens", tokens, weight)
    if position is not None:
        check_values("position", position, position_weight)
    y = F.embedding(tokens, weight)
    if position_weight is not None and position is None:
        position = torch.arange(T, device=tokens.device)
        y = (y.unflatten(0, (-1, T)) + F.embedding(position, position_weight)).flatten(0, 1)
    elif position_weight is not None:
        y = y + F.embedding(position, position_weight)
    return drop(y, dropout).to(dtype)


def _uses_composite(tokens: Tensor, weight: Tensor, *_) -> bool:
    """Whether the composite adds gradients in a fixed order, and in at least float32."""
    # Compiled for a CPU, the gradient of F.embedding uses atomics.
    return weight.dtype.itemsize > 2 and is_eager(weight)


# --- launchers: allocate, plan, launch by keyword; no checks, no autograd

# Columns per program, and elements of a tile of the forward: 16 for each of 128 threads.
BLOCK_COLUMNS, TILE_ELEMENTS = 256, 2_048
# Sorted tokens per piece, and rows of dy that a program of the backward loads at once. The most
# frequent token of English text is 5 % of all tokens: without pieces one program would add 1,600 of
# 32,768 rows, and the others would have finished.
PIECE, BLOCK_ROWS = 128, 4
# Pieces in which a program looks for the end of its run at once.
PIECES_PER_STEP = 256


def launch_fwd(
    tokens: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_weight: Tensor | None,
    order: Tensor | None,
    T: int,
    dtype: torch.dtype,
    dropout: Dropout,
) -> Tensor:
    """Kernel counterpart of `reference_fwd`."""
    N, (V, D) = tokens.shape[0], weight.shape
    y = torch.empty((N, D), dtype=dtype, device=weight.device)
    if N == 0:
        return y
    block_n = _block_columns(D)
    block_m = TILE_ELEMENTS // block_n
    has_positions = position_weight is not None
    launch_kernel(_embedding_fwd_kernel, (cdiv(N, block_m), cdiv(D, block_n)),
        tokens_ptr=tokens, weight_ptr=weight, position_ptr=position,
        position_weight_ptr=position_weight, y_ptr=y,
        stride_wv=weight.stride(0), stride_pc=position_weight.stride(0) if has_positions else 0,
        N=N, V=V, C=position_weight.shape[0] if has_positions else 0, T=T, D=D,
        BLOCK_M=block_m, BLOCK_N=block_n, **dropout.arguments,
    )  # fmt: skip
    return y


def _block_columns(D: int) -> int:
    """Columns per program: at least the four that share random bits."""
    return next_power_of_2(min(max(D, 4), BLOCK_COLUMNS))


def launch_bwd(
    dy: Tensor,
    tokens: Tensor,
    order: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    dropout: Dropout,
) -> Tensor:
    """Kernel counterpart of `reference_bwd`."""
    dweight = torch.zeros((rows, dy.shape[1]), dtype=dtype, device=dy.device)
    _launch_sums(dweight, dy, tokens, order, dropout, is_added=False)
    return dweight


def launch_add(
    dweight: Tensor, dy: Tensor, tokens: Tensor, order: Tensor | None, dropout: Dropout
) -> None:
    """Kernel counterpart of `reference_add`."""
    _launch_sums(dweight, dy, tokens, order, dropout, is_added=True)
    torch.autograd.graph.increment_version(dweight)


def _launch_sums(
    dweight: Tensor,
    dy: Tensor,
    tokens: Tensor,
    order: Tensor | None,
    dropout: Dropout,
    *,
    is_added: bool,
) -> None:
    """Write or add the sum of each token's rows of dy to its row of dweight."""
    N, D = dy.shape
    if N == 0:
        return
    if order is None:
        keys, order = tokens.sort(stable=True)
    else:
        keys, order = tokens[order], order.contiguous()
    block_n = _block_columns(D)
    pieces = cdiv(N, PIECE)
    partial = torch.empty((pieces, 2, D), dtype=torch.float32, device=dy.device)
    arguments = {
        "keys_ptr": keys, "partial_ptr": partial, "dweight_ptr": dweight,
        "N": N, "V": dweight.shape[0], "D": D,
        # One warp per program: its lanes load 16 bytes of 16-bit elements.
        "IS_ADDED": is_added, "PIECE": PIECE, "BLOCK_M": BLOCK_ROWS, "BLOCK_N": block_n,
        "num_warps": 1,
    }  # fmt: skip
    launch_kernel(_embedding_bwd_kernel, (N, cdiv(D, block_n)),
        dy_ptr=dy, order_ptr=order, stride_dym=dy.stride(0), **dropout.arguments, **arguments,
    )  # fmt: skip
    if pieces > 1:
        grid = (pieces - 1, cdiv(D, block_n))
        launch_kernel(_embedding_bwd_long_runs_kernel, grid, BLOCK_P=PIECES_PER_STEP, **arguments)


def cost(N: int, D: int, V: int, itemsize: int) -> dict[str, int]:
    """Return the least bytes to move, and the FLOPs, for float32 weights.

    `itemsize` is that of y. Each row of dweight is written once. The position weight is small and
    not counted.
    """
    return {
        "fwd_bytes": N * D * (4 + itemsize),
        "bwd_bytes": N * D * itemsize + 4 * V * D,
        "fwd_flops": N * D,
        "bwd_flops": N * D,
    }


# --- operator

_fwd = define_op(
    "embedding_fwd",
    launch=launch_fwd,
    reference=reference_fwd,
    shapes=shapes_fwd,
    composite=_composite_fwd,
    composite_if=_uses_composite,
)
_bwd = define_op("embedding_bwd", launch=launch_bwd, reference=reference_bwd)
_add = define_op(
    "embedding_add",
    launch=launch_add,
    reference=reference_add,
    mutates=("dweight",),
    public_name="embedding",
)


def _save(ctx, inputs, output):
    tokens, weight, position, position_weight, order, ctx.T, _, dropout = inputs
    ctx.weight_rows, ctx.weight_dtype = weight.shape[0], weight.dtype
    ctx.position_rows = 0 if position_weight is None else position_weight.shape[0]
    ctx.dropout_p = dropout.dropout_p
    ctx.save_for_backward(tokens, position, order, dropout.seed)


def _grad(ctx, dy, dhead=None):
    """Return the gradients of the arguments. `dhead` is the head's gradient of the weight."""
    tokens, position, order, seed = ctx.saved_tensors
    dropout = Dropout(dropout_p=ctx.dropout_p, seed=seed)
    needs_weight, needs_position_weight = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    dy = as_rows(dy)
    dweight = dposition = None
    if needs_weight and dhead is None:
        dweight = _bwd(dy, tokens, order, ctx.weight_rows, ctx.weight_dtype, dropout)
    elif needs_weight:
        dweight = dhead.contiguous()
        _add(dweight, dy, tokens, order, dropout)
    position_order = None
    if needs_position_weight and position is None and ctx.dropout_p > 0:
        # The kernel computes the mask. Equal positions are T rows apart.
        rows = torch.arange(dy.shape[0], device=dy.device)
        position, position_order = rows % ctx.T, rows.view(-1, ctx.T).t().reshape(-1)
    if needs_position_weight and position is not None:
        dposition = _bwd(dy, position, position_order, ctx.position_rows, ctx.weight_dtype, dropout)
    elif needs_position_weight:
        sums = torch.promote_types(dy.dtype, torch.float32)
        dposition = dy.unflatten(0, (-1, ctx.T)).sum(0, dtype=sums).to(ctx.weight_dtype)
        if ctx.position_rows > ctx.T:
            dposition = F.pad(dposition, (0, 0, 0, ctx.position_rows - ctx.T))
    return None, dweight, None, dposition, None, None, None, None


_fwd.register_autograd(_grad, setup_context=_save)


class _TiedEmbedding(torch.autograd.Function):
    """Return y, and the weight for a head. The backward gets the head's gradient of the weight."""

    @staticmethod
    def forward(ctx, *inputs):
        _save(ctx, inputs, None)
        ctx.set_materialize_grads(False)
        return _fwd.dispatch(*inputs), inputs[1].view_as(inputs[1])

    @staticmethod
    def backward(ctx, dy, dhead):
        if dy is None:
            return None, dhead, None, None, None, None, None, None
        return _grad(ctx, dy, dhead)


@public
def embedding(
    tokens: Tensor,
    weight: Tensor,
    *,
    position: Tensor | None = None,
    position_weight: Tensor | None = None,
    order: Tensor | None = None,
    dtype: torch.dtype | None = None,
    return_weight: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Look up a row of `weight` per token, add the row of its position, and apply dropout.

    Args:
        tokens: (..., T), int64 or int32.
        weight: (V, D), float32, bfloat16 or float16 (on the CPU also float64), device of tokens.
        position: (T,) or shape of tokens, int64 or int32; the backward sorts it. Default: 0 to
            T - 1.
        position_weight: (C, D), dtype and device of weight. Default: no positions are added.
        order: (N,) int64 or int32 for N tokens: `order_of(tokens)`, the stable sort of all tokens,
            flattened. Another order gives wrong gradients. Default: the backward sorts the tokens.
        dtype: dtype of the result; default: that of weight. Gradients have the dtype of weight.
        return_weight: also return `weight`, for a head that shares it. Pass it to one operator that
            returns its gradient in a new tensor, such as linear_cross_entropy. The backward adds to
            this tensor in place. Autograd would fill a second tensor with zeros and add both, which
            moves 16 V D bytes more in float32.
        dropout_p: probability of dropping an element of the sum, in [0, 1). Default: 0.
        seed: seed of the mask, an int or a () int64 tensor on the device of weight. The mask
            depends on the seed and on the index of an element only. Default: drawn from PyTorch's
            generator of that device.
    Returns: (..., T, D), contiguous; with return_weight also the weight.
    Raises: ValueError if shapes, dtypes or devices do not match, or for a dropout_p outside [0, 1).
        IndexError on the CPU for a token or position outside its table; on other devices its row is
        NaN and adds to no gradient. TypeError for float64 on a GPU.
    """
    # Check and flatten.
    check_arguments(tokens, weight, position, position_weight, order, dtype)
    weight = as_rows(weight)
    position_weight = None if position_weight is None else as_rows(position_weight)
    if position is not None:
        position = position.expand(tokens.shape).reshape(-1).contiguous()
    T = max(1, tokens.shape[-1]) if tokens.ndim else 1
    flat_tokens = tokens.reshape(-1).contiguous()
    dropout = resolve_dropout("embedding", dropout_p, seed, weight.device)
    dtype = dtype or weight.dtype
    inputs = (flat_tokens, weight, position, position_weight, order, T, dtype, dropout)

    # Look up. torch.func cannot transform the backward that writes to the head's gradient.
    is_tied = return_weight and torch.is_grad_enabled() and not is_transformed()
    if is_tied and not _fwd.uses_composite(*inputs):
        y, weight = _TiedEmbedding.apply(*inputs)
    else:
        y = _fwd(*inputs)
    y = y.view(*tokens.shape, weight.shape[1])
    return (y, weight) if return_weight else y


def order_of(tokens: Tensor) -> Tensor:
    """Return the order of `tokens` for the backward of `embedding`: (N,) int64, on their device."""
    return tokens.reshape(-1).sort(stable=True).indices
