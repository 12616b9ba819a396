"""A linear layer with its activation, and the two-layer GELU perceptron of GPT-2.

    linear     h = x w^T + b    y = g(h)              dh = dy g'(h)    dx = dh w    dw = dh^T x    db = sum_n dh
    gelu_mlp   h = x w1^T + b1    a = g(h)    y = a w2^T + b2
               da = dy w2    dh = da g'(h)    dx = dh w1    dw1 = dh^T x    db1 = sum_n dh    dw2 = dy^T a    db2 = sum_n dy
    GELU       g(h) = h Phi(h), Phi the normal distribution; "tanh": h (1 + tanh(u / 2)) / 2, u = 2 sqrt(2 / pi) (h + C h^3).
               (1 + tanh(u / 2)) / 2 is sigmoid(u), the same function in fewer instructions:
               with s = sigmoid(u)    g(h) = h s    g'(h) = s + s (1 - s) h du/dh

Shapes     x, dx: (N, D)   w1, dw1: (F, D)   h, a, dh: (N, F)   w2, dw2: (D, F)   y, dy: (N, D)   N = leading axes, flattened
Precision  any float dtype in and out; products in it, summed in float32; h and a are stored in it; GELU itself in float32
Fusion     a and h come out of one product of ours, dh and db1 out of another, or of cuBLAS's and a kernel each: _gemm.plan
Memory     keeps h and a. recompute keeps h alone and goes through RECOMPUTE_ROWS rows at a time, forward and backward, so that
           no other (N, F) tensor is ever there: a is formed again, of rounded h where fused forwards form it of h itself, and
           weights' gradients are summed over chunks in float32, so that they differ by rounding
Cost       compute-bound: 4 N D F FLOPs forward, 8 N D F backward; see cost()
Source     Hendrycks & Gimpel 2016, arXiv:1606.08415; GPT-2 uses the tanh form
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..core.layout import as_rows, like_rows_of
from ..core.matmul import autocast, matmul_out
from ..core.op import define_op, is_32_bit, keep_needed, public
from ._checks import check_parameter, check_x
from ._epilogues import EPILOGUES, launch_activation_bwd, launch_activation_fwd
from ._gemm import gemm, is_fused

# Where a is not kept. ESTIMATE for an H200 at D = 768: a tenth more time than all rows at once. Half of it adds to dw1 and dw2
# in float32, half are multiprocessors that idle while dx and y are formed, of which so few rows have 1.5 tiles for each.
RECOMPUTE_ROWS = 8_192
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
APPROXIMATE = ("tanh", "none")


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, products: str
) -> tuple[Tensor, Tensor]:
    """Return y = gelu(h) and h, in x's dtype. `products` says how kernels form them, here as in all that follow."""
    h = functional.linear(x, weight, bias)
    return functional.gelu(h, approximate=approximate), h


def reference_linear_gelu_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, h: Tensor, approximate: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; empty for those that `needs` does not name."""
    return _linear_bwd(
        torch.ops.aten.gelu_backward(dy, h, approximate=approximate), x, weight, needs
    )


def reference_gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    recompute: bool,
    products: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h and a, which is empty if the backward is to form it again."""
    h = functional.linear(x, w1, b1)
    a = functional.gelu(h, approximate=approximate)
    return functional.linear(a, w2, b2), h, a.new_empty(0) if recompute else a


def reference_gelu_mlp_bwd(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, h: Tensor, a: Tensor | None, approximate: str, products: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, w1, b1, w2 and b2; empty for those that `needs` does not name."""
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = needs
    if a is None and needs_w2:
        a = functional.gelu(h, approximate=approximate)
    needs_h = needs_x or needs_w1 or needs_b1
    da, dw2, db2 = _linear_bwd(dy, a, w2, (needs_h, needs_w2, needs_b2))
    dh = (
        torch.ops.aten.gelu_backward(da, h, approximate=approximate) if needs_h else dy.new_empty(0)
    )
    return *_linear_bwd(dh, x, w1, (needs_x, needs_w1, needs_b1)), dw2, db2


def _linear_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_weight, needs_bias = needs
    return (
        torch.mm(dy, weight) if needs_x else dy.new_empty(0),
        torch.mm(dy.t(), x) if needs_weight else dy.new_empty(0),
        dy.sum(0) if needs_bias else dy.new_empty(0),
    )


# --- launchers: products by _gemm.py with what follows them, or by cuBLAS and what stands between them by _mlp_kernels.py


def launch_linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, products: str
) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_linear_gelu_fwd`."""
    h = x.new_empty(x.shape[0], weight.shape[0])
    return _activated(x, weight, bias, approximate, products, h), h


def launch_linear_gelu_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, h: Tensor, approximate: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_linear_gelu_bwd`."""
    needs_x, needs_weight, needs_bias = needs
    db = h.new_empty(h.shape[1] if needs_bias else 0)
    dh = launch_activation_bwd(dy.contiguous(), h, approximate, db if needs_bias else None)
    dx, dw, _ = _linear_bwd(dh, x, weight, (needs_x, needs_weight, False))
    return dx, dw, db


def launch_gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    recompute: bool,
    products: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_gelu_mlp_fwd`."""
    y, h = (x.new_empty(x.shape[0], weight.shape[0]) for weight in (w2, w1))
    for rows in _chunks(x.shape[0], recompute):
        a = _activated(x[rows], w1, b1, approximate, products, h[rows])
        _linear(a, w2, b2, y[rows])
    return y, h, x.new_empty(0) if recompute else a


def launch_gelu_mlp_bwd(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, h: Tensor, a: Tensor | None, approximate: str, products: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Kernel counterpart of `reference_gelu_mlp_bwd`."""
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = needs
    chunks = _chunks(x.shape[0], a is None)
    # What chunks add to is rounded once, at the end.
    dtype = x.dtype if len(chunks) == 1 else torch.float32
    dx = x.new_empty(x.shape if needs_x else 0)
    dw1, dw2 = (
        w.new_empty(w.shape if needed else 0, dtype=dtype)
        for w, needed in ((w1, needs_w1), (w2, needs_w2))
    )
    db1 = x.new_empty(len(chunks), h.shape[1] if needs_b1 else 0, dtype=dtype)
    for chunk, rows in enumerate(chunks):
        if needs_w2:
            formed = launch_activation_fwd(h[rows], approximate) if a is None else a
            matmul_out(dy[rows].t(), formed, dw2, accumulate=chunk > 0)
            del formed  # before dh is there
        if needs_x or needs_w1 or needs_b1:
            dh = _dh(dy[rows], w2, h[rows], approximate, products, db1[chunk] if needs_b1 else None)
            if needs_x:
                torch.mm(dh, w1, out=dx[rows])
            if needs_w1:
                matmul_out(dh.t(), x[rows], dw1, accumulate=chunk > 0)
            del dh
    _, _, db2 = _linear_bwd(dy, None, w2, (False, False, needs_b2))
    return (
        dx,
        dw1.to(x.dtype),
        db1.sum(0).to(x.dtype) if len(chunks) > 1 else db1.view(-1),
        dw2.to(x.dtype),
        db2,
    )


def _chunks(N: int, recompute: bool) -> list[slice]:
    """Rows that are gone through at a time: all of them, or where a is not kept so few that it hardly shows."""
    step = RECOMPUTE_ROWS if recompute else N
    return [slice(start, start + step) for start in range(0, N, step or 1)] or [slice(0, 0)]


def _activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, products: str, h: Tensor
) -> Tensor:
    """Return gelu(h), and write h."""
    if is_fused(products, x, weight.shape[0]):
        return gemm(x, weight.t(), bias, epilogue=EPILOGUES[approximate][0], pre=h)
    _linear(x, weight, bias, h)
    return launch_activation_fwd(h, approximate)


def _dh(
    dy: Tensor, w2: Tensor, h: Tensor, approximate: str, products: str, db: Tensor | None
) -> Tensor:
    """Return (dy w2) g'(h); `db` gets the sums of its columns."""
    if is_fused(products, dy, w2.shape[1], has_aux=True):
        return gemm(dy, w2, aux=h, epilogue=EPILOGUES[approximate][1], sums=db)
    return launch_activation_bwd(torch.mm(dy, w2), h, approximate, db)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def cost(N: int, D: int, F: int, itemsize: int, *, recompute: bool = False) -> dict[str, int]:
    """Least bytes to move and FLOPs of the products of gelu_mlp, forward and backward, `itemsize` bytes an element.

    Forward: x, both weights in; y, h and, unless it is formed again, a out. Backward: dy and all of these but y in; dx, dw1
    and dw2 out. For one linear layer with activation, (N, D) to (N, F), count half of the FLOPs.
    """
    saved = (1 if recompute else 2) * N * F
    return {
        "fwd_bytes": (2 * N * D + 2 * F * D + saved) * itemsize,
        "bwd_bytes": (3 * N * D + 4 * F * D + saved) * itemsize,
        "fwd_flops": 4 * N * D * F,
        "bwd_flops": 8 * N * D * F,
    }


# --- operator

_linear_fwd = define_op(
    "linear_fwd", launch=launch_linear_gelu_fwd, reference=reference_linear_gelu_fwd,
    composite=reference_linear_gelu_fwd,
)  # fmt: skip
_linear_bwd_op = define_op(
    "linear_bwd", launch=launch_linear_gelu_bwd, reference=reference_linear_gelu_bwd
)


def _composite_applies(
    x: Tensor, w1, b1, w2, b2, approximate: str, recompute: bool, products
) -> bool:
    """Autograd would keep GELU's output, which recompute promises not to do."""
    return is_32_bit(x) and not recompute


_mlp_fwd = define_op(
    "gelu_mlp_fwd", launch=launch_gelu_mlp_fwd, reference=reference_gelu_mlp_fwd,
    composite=reference_gelu_mlp_fwd, composite_if=_composite_applies,
)  # fmt: skip
_mlp_bwd = define_op("gelu_mlp_bwd", launch=launch_gelu_mlp_bwd, reference=reference_gelu_mlp_bwd)


def _save_linear(ctx, inputs, output):
    x, weight, _, ctx.approximate, _ = inputs
    _, h = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, h)


def _grad_linear(ctx, dy, _dh):
    if dy is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:3]
    return (
        *keep_needed(_linear_bwd_op(dy, *ctx.saved_tensors, ctx.approximate, needs), needs),
        None,
        None,
    )


def _save_mlp(ctx, inputs, output):
    x, w1, _, w2, _, ctx.approximate, recompute, ctx.products = inputs
    _, h, a = output
    # No zeros for the gradients of h and a, which nobody outside sees.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, w2, h, *(() if recompute else (a,)))


def _grad_mlp(ctx, dy, _dh, _da):
    if dy is None:
        return (None,) * 8
    x, w1, w2, h, *a = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    grads = _mlp_bwd(dy, x, w1, w2, h, a[0] if a else None, ctx.approximate, ctx.products, needs)
    return *keep_needed(grads, needs), None, None, None


_linear_fwd.register_autograd(_grad_linear, setup_context=_save_linear)
_mlp_fwd.register_autograd(_grad_mlp, setup_context=_save_mlp)


@public
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Apply a linear layer and its activation.

    Args:
        x: (..., D), float32, bfloat16 or float16 (float64 on the CPU too), any layout.
        weight: (F, D), as nn.Linear stores it, dtype and device of x; under torch.autocast all three are cast.
        bias: (F,), dtype and device of x, or None.
        activation: None (then this is torch.nn.functional.linear), "gelu" or "gelu_tanh".
    Returns: (..., F), dtype of x, or the autocast dtype.
    Raises: ValueError if shapes, dtypes or devices do not match, or for another activation; TypeError for float64 and one of
        these on a GPU.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"linear: activation must be None, {' or '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )
    x, weight, bias = autocast(x, weight, bias)
    check_x("linear", x)
    check_parameter("linear", "weight", weight, ("F", x.shape[-1]), x)
    check_parameter("linear", "bias", bias, (weight.shape[0],), x)
    if activation is None:
        return functional.linear(x, weight, bias)
    y, _ = _linear_fwd(as_rows(x), weight, bias, ACTIVATIONS[activation], "auto")
    return like_rows_of(x, y)


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
    """Apply a linear layer, GELU, and a second linear layer back to the first one's width.

    Args:
        x: (..., D), float32, bfloat16 or float16 (float64 on the CPU too), any layout.
        w1: (F, D), as nn.Linear stores it, dtype and device of x; under torch.autocast all five are cast.
        b1: (F,), dtype and device of x, or None.
        w2: (D, F), as w1.
        b2: (D,), as b1.
        approximate: "tanh", GPT-2's GELU, or "none", the exact one.
        recompute: keep one (..., F) tensor for the backward, not two: GELU is computed again there.
    Returns: (..., D), dtype of x, or the autocast dtype.
    Raises: ValueError if shapes, dtypes or devices do not match, or for another approximate; TypeError for float64 on a GPU.
    """
    if approximate not in APPROXIMATE:
        raise ValueError(
            f"gelu_mlp: approximate must be {' or '.join(map(repr, APPROXIMATE))}, got {approximate!r}"
        )
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    check_x("gelu_mlp", x)
    D = x.shape[-1]
    check_parameter("gelu_mlp", "w1", w1, ("F", D), x)
    check_parameter("gelu_mlp", "b1", b1, w1.shape[:1], x)
    check_parameter("gelu_mlp", "w2", w2, (D, w1.shape[0]), x)
    check_parameter("gelu_mlp", "b2", b2, (D,), x)
    y, _, _ = _mlp_fwd(as_rows(x), w1, b1, w2, b2, approximate, recompute, "auto")
    return like_rows_of(x, y)
