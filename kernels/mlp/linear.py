"""A linear layer with an activation g: GELU or relu2. _epilogues.py has their formulas.

    forward    h = x w^T + b    y = g(h)
    backward   dh = dy g'(h)    dx = dh w    dw = dh^T x    db = sum_n dh

Shapes     x, dx: (N, D)   w, dw: (F, D)   b, db: (F,)   h, y, dh, dy: (N, F)
           N = all leading axes, flattened
Precision  any float dtype in and out; matmuls in that dtype, accumulated in float32; h is stored
           in it; g in float32
Fusion     y and h come from one GEMM with an epilogue, or from cuBLAS and one elementwise kernel:
           plan() of gemm.py chooses. dh and db come from one elementwise kernel.
Memory     keeps x and h for the backward
Cost       compute-bound: 2 N D F FLOPs forward, 4 N D F backward; see cost()
Source     Hendrycks & Gimpel 2016, arXiv:1606.08415; So et al. 2021, arXiv:2109.08668 (relu2)
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from ..core.layout import as_rows, like_rows_of
from ..core.matmul import autocast, check_x
from ..core.op import define_op, keep_needed, public
from ._checks import check_choice, check_parameter
from ._epilogues import ACTIVATIONS, launch_activation_bwd
from ._linear_layer import linear_activation, linear_bwd

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, matmul: str
) -> tuple[Tensor, Tensor]:
    """Return y and h. `matmul` is for the launcher: "auto", "fused" or "cublas"."""
    h = functional.linear(x, weight, bias)
    return ACTIVATIONS[activation].reference(h), h


def reference_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, h: Tensor, activation: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias. Gradients that are not needed are empty."""
    dh = ACTIVATIONS[activation].reference_bwd(dy, h)
    return linear_bwd(dh, x, weight, needs)


# --- launchers: allocate, plan, launch by keyword


def launch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, matmul: str
) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    h = x.new_empty(x.shape[0], weight.shape[0])
    return linear_activation(x, weight, bias, activation, matmul, h), h


def launch_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, h: Tensor, activation: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_bwd`."""
    needs_x, needs_weight, needs_bias = needs
    db = h.new_empty(h.shape[1] if needs_bias else 0)
    dh = launch_activation_bwd(dy.contiguous(), h, activation, db if needs_bias else None)
    dx, dw, _ = linear_bwd(dh, x, weight, (needs_x, needs_weight, False))
    return dx, dw, db


def cost(N: int, D: int, F: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move, and FLOPs of the matmuls, with `itemsize` bytes per element.

    Forward: read x and w; write y and h. Backward: read dy, x, w and h; write dx and dw.
    """
    return {
        "fwd_bytes": (N * D + F * D + 2 * N * F) * itemsize,
        "bwd_bytes": (2 * N * D + 2 * F * D + 2 * N * F) * itemsize,
        "fwd_flops": 2 * N * D * F,
        "bwd_flops": 4 * N * D * F,
    }


# --- operator

_fwd = define_op("linear_fwd", launch=launch_fwd, reference=reference_fwd, composite=reference_fwd)
_bwd = define_op("linear_bwd", launch=launch_bwd, reference=reference_bwd)


def _save(ctx, inputs, output):
    x, weight, _, ctx.activation, _ = inputs
    _, h = output
    # Do not allocate zeros for the gradient of h: nobody uses it.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, h)


def _grad(ctx, dy, _dh):
    if dy is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:3]
    grads = _bwd(dy, *ctx.saved_tensors, ctx.activation, needs)
    return *keep_needed(grads, needs), None, None


_fwd.register_autograd(_grad, setup_context=_save)


@public
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Apply a linear layer and an activation.

    Args:
        x: (..., D), float32, bfloat16 or float16 (on the CPU also float64), any layout.
        weight: (F, D), as nn.Linear stores it, dtype and device of x. torch.autocast casts x,
            weight and bias.
        bias: (F,), dtype and device of x, or None.
        activation: "gelu", "gelu_tanh" (the tanh form of GELU), "relu2" (the square of ReLU), or
            None, which makes this torch.nn.functional.linear.
    Returns: (..., F), dtype of x, or the autocast dtype.
    Raises: ValueError if shapes, dtypes or devices do not match, or for an unknown activation.
        TypeError for float64 with an activation on a GPU.
    """
    if activation is not None:
        check_choice("linear", "activation", activation, ACTIVATIONS)
    x, weight, bias = autocast(x, weight, bias)
    check_x("linear", x)
    check_parameter("linear", "weight", weight, ("F", x.shape[-1]), x)
    check_parameter("linear", "bias", bias, (weight.shape[0],), x)
    if activation is None:
        return functional.linear(x, weight, bias)
    y, _ = _fwd(as_rows(x), weight, bias, activation, "auto")
    return like_rows_of(x, y)
