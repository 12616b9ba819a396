"""The gated perceptron of Llama: two linear layers, one through SiLU as the other's gate, and a third back.

    forward    g = x wg^T    u = x wu^T    a = silu(g) u    y = a wd^T              silu(g) = g s    s = 1 / (1 + exp(-g))
    backward   da = dy wd    dg = da u (s + g s (1 - s))    du = da silu(g)
               dx = dg wg + du wu    dwg = dg^T x    dwu = du^T x    dwd = dy^T a

Shapes     x, dx: (N, D)   wg, wu: (F, D)   g, u, a: (N, F)   wd: (D, F)   y, dy: (N, D)     N = leading axes, flattened
Precision  any float dtype in and out; products in it, summed in float32; g, u and a are stored in it; SiLU in float32
Memory     keeps g and u; the backward forms a again on its way over them, one write where keeping a would be one tensor
Cost       compute-bound: 6 N D F FLOPs forward, 12 N D F backward; see cost()
Source     Shazeer 2020, arXiv:2002.05202
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..core.layout import as_rows, like_rows_of, wide
from ..core.matmul import autocast
from ..core.op import define_op, keep_needed, public
from ._checks import check_parameter, check_x
from ._epilogues import launch_swiglu_bwd, launch_swiglu_fwd, swiglu
from ._gemm import gemm, is_fused

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, products: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, g and u. `products` says how kernels form them."""
    gate, up = functional.linear(x, w_gate), functional.linear(x, w_up)
    a = functional.silu(wide(gate)).mul_(up).to(x.dtype)
    return functional.linear(a, w_down), gate, up


def reference_bwd(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w_gate, w_up and w_down; empty for those that `needs` does not name."""
    da, g = wide(torch.mm(dy, w_down)), wide(gate)
    s = torch.sigmoid(g)
    silu = g * s
    dgate = torch.addcmul(s, silu, 1 - s).mul_(da * up).to(x.dtype)
    return _products(
        dy, x, w_gate, w_up, dgate, (da * silu).to(x.dtype), (silu * up).to(x.dtype), needs
    )


def _products(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    dgate: Tensor,
    dup: Tensor,
    a: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.mm(dgate, w_gate).addmm_(dup, w_up) if needs[0] else dy.new_empty(0)
    factors = ((dgate, x), (dup, x), (dy, a))
    dw = (
        torch.mm(dh.t(), h) if needed else dy.new_empty(0)
        for (dh, h), needed in zip(factors, needs[1:], strict=True)
    )
    return dx, *dw


# --- launchers: products by cuBLAS, but u's with what follows it by _gemm.py where that pays; the rest in _mlp_kernels.py


def launch_fwd(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, products: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    gate = functional.linear(x, w_gate)
    if is_fused(products, x, w_up.shape[0], has_aux=True):
        up = torch.empty_like(gate)
        a = gemm(x, w_up.t(), aux=gate, epilogue=swiglu, pre=up)
    else:
        up = functional.linear(x, w_up)
        a = launch_swiglu_fwd(gate, up)
    return functional.linear(a, w_down), gate, up


def launch_bwd(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_bwd`."""
    return _products(dy, x, w_gate, w_up, *launch_swiglu_bwd(torch.mm(dy, w_down), gate, up), needs)


def cost(N: int, D: int, F: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move and FLOPs of the products, forward and backward; `itemsize` bytes an element.

    Forward: x and the weights in; y, g and u out. Backward: dy and all of these but y in; dx and the weights' gradients out.
    """
    return {
        "fwd_bytes": (2 * N * D + 3 * F * D + 2 * N * F) * itemsize,
        "bwd_bytes": (3 * N * D + 6 * F * D + 2 * N * F) * itemsize,
        "fwd_flops": 6 * N * D * F,
        "bwd_flops": 12 * N * D * F,
    }


# --- operator

_fwd = define_op("swiglu_mlp_fwd", launch=launch_fwd, reference=reference_fwd)
_bwd = define_op("swiglu_mlp_bwd", launch=launch_bwd, reference=reference_bwd)


def _save(ctx, inputs, output):
    _, gate, up = output
    # No zeros for the gradients of gate and up, which nobody outside sees.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], gate, up)


def _grad(ctx, dy, _dgate, _dup):
    needs = ctx.needs_input_grad[:4]
    if dy is None:
        return (None,) * 5
    return *keep_needed(_bwd(dy, *ctx.saved_tensors, needs), needs), None


_fwd.register_autograd(_grad, setup_context=_save)


@public
def swiglu_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Apply two linear layers, multiply one's output by SiLU of the other's, and apply a third back to the first width.

    Args:
        x: (..., D), float32, bfloat16 or float16 (float64 on the CPU too), any layout.
        w_gate, w_up: (F, D), as nn.Linear stores them, dtype and device of x; under torch.autocast all are cast.
        w_down: (D, F), as w_gate.
    Returns: (..., D), dtype of x, or the autocast dtype.
    Raises: ValueError if shapes, dtypes or devices do not match; TypeError for float64 on a GPU.
    """
    x, w_gate, w_up, w_down = autocast(x, w_gate, w_up, w_down)
    check_x("swiglu_mlp", x)
    D = x.shape[-1]
    check_parameter("swiglu_mlp", "w_gate", w_gate, ("F", D), x)
    check_parameter("swiglu_mlp", "w_up", w_up, tuple(w_gate.shape), x)
    check_parameter("swiglu_mlp", "w_down", w_down, (D, w_gate.shape[0]), x)
    y, _, _ = _fwd(as_rows(x), w_gate, w_up, w_down, "auto")
    return like_rows_of(x, y)
