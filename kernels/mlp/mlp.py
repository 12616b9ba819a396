"""The MLP of GPT-2: two linear layers with an activation g in between, GELU or relu2.

    forward    h = x w1^T + b1    a = g(h)    y = a w2^T + b2
    backward   da = dy w2    dh = da g'(h)    dx = dh w1
               dw1 = dh^T x    db1 = sum_n dh    dw2 = dy^T a    db2 = sum_n dy

Shapes     x, y, dx, dy: (N, D)   w1: (F, D)   h, a, dh: (N, F)   w2: (D, F)
           N = all leading axes, flattened
Precision  any float dtype in and out; matmuls in that dtype, accumulated in float32; h and a are
           stored in it; g in float32. _epilogues.py has the formulas of g.
Fusion     a and h come from one GEMM with an epilogue, or from cuBLAS and one elementwise kernel:
           plan() of gemm.py chooses. The same holds for dh and db1.
Memory     keeps h and a for the backward. With `recompute` it keeps only h. Forward and backward
           then take RECOMPUTE_ROWS rows at a time, so that no other (N, F) tensor exists.
           `recompute` can change gradients by rounding. The backward computes a from the rounded h,
           while a fused forward computes it from h in float32. The sums of dw1, dw2 and db1 over
           the chunks are in float32.
Cost       compute-bound: 4 N D F FLOPs forward, 8 N D F backward; see cost()
Source     GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415; GPT-2 uses the tanh form;
           relu2: So et al. 2021, arXiv:2109.08668
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..core.layout import as_rows, like_rows_of
from ..core.matmul import autocast, check_x, matmul_out
from ..core.op import Op, define_op, is_32_bit, keep_needed, public
from ._checks import check_choice, check_parameter
from ._epilogues import ACTIVATIONS, launch_activation_bwd, launch_activation_fwd
from ._linear_layer import linear_activation, linear_bwd, linear_out
from .gemm import gemm, is_fused

# Rows per chunk with `recompute`. ESTIMATE for an H200 at D = 768: a tenth slower than all rows at
# once. Half of the extra time goes into adding to dw1 and dw2 in float32. In the other half
# multiprocessors are idle, because the matmuls of dx and y have only 1.5 tiles per multiprocessor.
RECOMPUTE_ROWS = 8_192
# Activations by PyTorch's argument `approximate`.
APPROXIMATE = {"tanh": "gelu_tanh", "none": "gelu"}


def check_approximate(name: str, approximate: str) -> None:
    """Raise a ValueError for an unknown `approximate`. `name` is the operator or module."""
    check_choice(name, "approximate", approximate, APPROXIMATE)


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    recompute: bool,
    matmul: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h and a, which is empty with `recompute`.

    `matmul` is for the launcher: "auto", "fused" or "cublas".
    """
    h = functional.linear(x, w1, b1)
    a = ACTIVATIONS[activation].reference(h)
    return functional.linear(a, w2, b2), h, a.new_empty(0) if recompute else a


def reference_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    h: Tensor,
    a: Tensor | None,
    activation: str,
    matmul: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w1, b1, w2 and b2. Gradients that are not needed are empty."""
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = needs
    needs_h = needs_x or needs_w1 or needs_b1
    if a is None and needs_w2:
        a = ACTIVATIONS[activation].reference(h)
    # second layer, then activation, then first layer
    da, dw2, db2 = linear_bwd(dy, a, w2, (needs_h, needs_w2, needs_b2))
    dh = da
    if needs_h:
        dh = ACTIVATIONS[activation].reference_bwd(da, h)
    dx, dw1, db1 = linear_bwd(dh, x, w1, (needs_x, needs_w1, needs_b1))
    return dx, dw1, db1, dw2, db2


# --- launchers: allocate, plan, launch by keyword


def launch_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    recompute: bool,
    matmul: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    N = x.shape[0]
    y = x.new_empty(N, w2.shape[0])
    h = x.new_empty(N, w1.shape[0])
    for rows in _row_chunks(N, recompute):
        a = linear_activation(_part(x, rows), w1, b1, activation, matmul, _part(h, rows))
        linear_out(a, w2, b2, _part(y, rows))
    return y, h, x.new_empty(0) if recompute else a


def launch_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    h: Tensor,
    a: Tensor | None,
    activation: str,
    matmul: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_bwd`."""
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = needs
    chunks = _row_chunks(x.shape[0], a is None)
    # Sums over several chunks are kept in float32 and rounded once, at the end.
    dtype = x.dtype if len(chunks) == 1 else torch.float32
    dx = x.new_empty(x.shape if needs_x else 0)
    dw1 = x.new_empty(w1.shape if needs_w1 else 0, dtype=dtype)
    dw2 = x.new_empty(w2.shape if needs_w2 else 0, dtype=dtype)
    db1 = x.new_empty(len(chunks), h.shape[1] if needs_b1 else 0, dtype=dtype)

    for chunk, rows in enumerate(chunks):
        # second layer
        if needs_w2:
            a_rows = launch_activation_fwd(_part(h, rows), activation) if a is None else a
            matmul_out(_part(dy, rows).t(), a_rows, dw2, accumulate=chunk > 0)
            del a_rows  # frees it before dh is allocated
        # activation and first layer
        if needs_x or needs_w1 or needs_b1:
            db = db1[chunk] if needs_b1 else None
            dh = _launch_dh(_part(dy, rows), w2, _part(h, rows), activation, matmul, db)
            if needs_x:
                torch.mm(dh, w1, out=_part(dx, rows))
            if needs_w1:
                matmul_out(dh.t(), _part(x, rows), dw1, accumulate=chunk > 0)
            del dh

    db2 = dy.sum(0) if needs_b2 else dy.new_empty(0)
    db1 = db1.sum(0).to(x.dtype) if len(chunks) > 1 else db1.view(-1)
    return dx, dw1.to(x.dtype), db1, dw2.to(x.dtype), db2


def _row_chunks(N: int, recompute: bool) -> list[slice | None]:
    """With `recompute` slices of RECOMPUTE_ROWS rows if there are more; else None: all rows."""
    if not recompute or N <= RECOMPUTE_ROWS:
        return [None]
    return [slice(start, start + RECOMPUTE_ROWS) for start in range(0, N, RECOMPUTE_ROWS)]


def _part(x: Tensor, rows: slice | None) -> Tensor:
    """Return the rows of a chunk."""
    return x if rows is None else x[rows]


def _launch_dh(
    dy: Tensor, w2: Tensor, h: Tensor, activation: str, matmul: str, db: Tensor | None
) -> Tensor:
    """Return dh = (dy w2) g'(h), and write the sums of its columns to `db`."""
    if is_fused(matmul, dy, w2.shape[1], has_aux=True):
        return gemm(dy, w2, aux=h, epilogue=ACTIVATIONS[activation].epilogue_bwd, sums=db)
    return launch_activation_bwd(torch.mm(dy, w2), h, activation, db)


def cost(N: int, D: int, F: int, itemsize: int, *, recompute: bool = False) -> dict[str, int]:
    """Least bytes to move, and FLOPs of the matmuls, with `itemsize` bytes per element.

    Forward: read x, w1 and w2; write y, h and, without `recompute`, a. Backward: read dy and these
    tensors except y; write dx, dw1 and dw2.
    """
    saved = (1 if recompute else 2) * N * F
    return {
        "fwd_bytes": (2 * N * D + 2 * F * D + saved) * itemsize,
        "bwd_bytes": (3 * N * D + 4 * F * D + saved) * itemsize,
        "fwd_flops": 4 * N * D * F,
        "bwd_flops": 8 * N * D * F,
    }


# --- operator


def _composite_applies(x: Tensor, w1, b1, w2, b2, activation, recompute: bool, matmul) -> bool:
    """The composite does not apply with `recompute`, because autograd would keep a."""
    return is_32_bit(x) and not recompute


def _save(ctx, inputs, output):
    x, w1, _, w2, _, ctx.activation, recompute, ctx.matmul = inputs
    _, h, a = output
    # Do not allocate zeros for the gradients of h and a: nobody uses them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, w2, h, *(() if recompute else (a,)))


def _define(name: str) -> Op:
    """Register the forward and the backward of the public operator `name`."""
    fwd = define_op(
        f"{name}_fwd",
        launch=launch_fwd,
        reference=reference_fwd,
        composite=reference_fwd,
        composite_if=_composite_applies,
    )
    bwd = define_op(f"{name}_bwd", launch=launch_bwd, reference=reference_bwd)

    def grad(ctx, dy, _dh, _da):
        if dy is None:
            return (None,) * 8
        x, w1, w2, h, *a = ctx.saved_tensors
        a = a[0] if a else None
        needs = ctx.needs_input_grad[:5]
        grads = bwd(dy, x, w1, w2, h, a, ctx.activation, ctx.matmul, needs)
        return *keep_needed(grads, needs), None, None, None

    fwd.register_autograd(grad, setup_context=_save)
    return fwd


_gelu_fwd = _define("gelu_mlp")
_relu2_fwd = _define("relu2_mlp")


@public
def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "tanh",
    recompute: bool = False,
) -> Tensor:
    """Apply a linear layer, GELU, and a second linear layer.

    Args:
        x: (..., D), float32, bfloat16 or float16 (on the CPU also float64), any layout.
        w1: (F, D), as nn.Linear stores it, dtype and device of x. torch.autocast casts x and all
            parameters.
        b1: (F,), dtype and device of x, or None.
        w2: (D, F), like w1.
        b2: (D,), like b1.
        approximate: "tanh", the tanh form of GELU that GPT-2 uses, or "none", exact GELU.
        recompute: keep one (..., F) tensor for the backward instead of two, and compute GELU again
            there.
    Returns: (..., D), dtype of x, or the autocast dtype.
    Raises: ValueError if shapes, dtypes or devices do not match, or for an unknown `approximate`.
        TypeError for float64 on a GPU.
    """
    check_approximate("gelu_mlp", approximate)
    x, *parameters = _checked("gelu_mlp", x, w1, b1, w2, b2)
    y, _, _ = _gelu_fwd(as_rows(x), *parameters, APPROXIMATE[approximate], recompute, "auto")
    return like_rows_of(x, y)


@public
def relu2_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Apply a linear layer, the square of ReLU, and a second linear layer.

    Args:
        x, w1, b1, w2, b2: as for gelu_mlp.
        recompute: keep one (..., F) tensor for the backward instead of two, and compute the
            activation again there.
    Returns: (..., D), dtype of x, or the autocast dtype.
    Raises: ValueError if shapes, dtypes or devices do not match. TypeError for float64 on a GPU.
    """
    x, *parameters = _checked("relu2_mlp", x, w1, b1, w2, b2)
    y, _, _ = _relu2_fwd(as_rows(x), *parameters, "relu2", recompute, "auto")
    return like_rows_of(x, y)


def _checked(
    name: str, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
) -> list[Tensor | None]:
    """Cast the tensors as autocast asks, and raise a ValueError unless they match."""
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    check_x(name, x)
    D = x.shape[-1]
    check_parameter(name, "w1", w1, ("F", D), x)
    check_parameter(name, "b1", b1, w1.shape[:1], x)
    check_parameter(name, "w2", w2, (D, w1.shape[0]), x)
    check_parameter(name, "b2", b2, (D,), x)
    return [x, w1, b1, w2, b2]
