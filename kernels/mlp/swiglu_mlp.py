"""The MLP of Llama: two linear layers, SiLU of the first times the second, and a third layer.

    forward    g = x wg^T    u = x wu^T    a = silu(g) u    y = a wd^T
               silu(g) = g s    s = 1 / (1 + exp(-g))
    backward   da = dy wd    dg = da u (s + g s (1 - s))    du = da silu(g)
               dx = dg wg + du wu    dwg = dg^T x    dwu = du^T x    dwd = dy^T a

Shapes     x, y, dx, dy: (N, D)   wg, wu: (F, D)   g, u, a: (N, F)   wd: (D, F)
           N = all leading axes, flattened
Precision  any float dtype in and out; matmuls in that dtype, accumulated in float32; g, u and a are
           stored in it; SiLU in float32
Fusion     u and a come from one GEMM with an epilogue, or from cuBLAS and one elementwise kernel:
           plan() of gemm.py chooses. cuBLAS computes the other matmuls.
Memory     keeps g and u for the backward, where one elementwise kernel computes dg, du and a
Cost       compute-bound: 6 N D F FLOPs forward, 12 N D F backward; see cost()
Source     Shazeer 2020, arXiv:2002.05202
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..core.layout import as_rows, like_rows_of
from ..core.matmul import autocast, check_x
from ..core.op import define_op, keep_needed, public
from ._checks import check_parameter
from ._epilogues import (
    launch_swiglu_bwd,
    launch_swiglu_fwd,
    reference_swiglu_bwd,
    reference_swiglu_fwd,
    swiglu,
)
from .gemm import gemm, is_fused

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_fwd(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, matmul: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, g and u. `matmul` is for the launcher: "auto", "fused" or "cublas"."""
    gate = functional.linear(x, w_gate)
    up = functional.linear(x, w_up)
    return functional.linear(reference_swiglu_fwd(gate, up), w_down), gate, up


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
    """Return gradients of x, w_gate, w_up and w_down. Gradients that are not needed are empty."""
    dgate, dup, a = reference_swiglu_bwd(torch.mm(dy, w_down), gate, up)
    return _matmuls_bwd(dy, x, w_gate, w_up, dgate, dup, a, needs)


def _matmuls_bwd(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    dgate: Tensor,
    dup: Tensor,
    a: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx and the gradients of the three weights, from dg, du and a."""
    needs_x, needs_gate, needs_up, needs_down = needs
    return (
        torch.mm(dgate, w_gate).addmm_(dup, w_up) if needs_x else dy.new_empty(0),
        torch.mm(dgate.t(), x) if needs_gate else dy.new_empty(0),
        torch.mm(dup.t(), x) if needs_up else dy.new_empty(0),
        torch.mm(dy.t(), a) if needs_down else dy.new_empty(0),
    )


# --- launchers: allocate, plan, launch by keyword


def launch_fwd(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, matmul: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    gate = functional.linear(x, w_gate)
    if is_fused(matmul, x, w_up.shape[0], has_aux=True):
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
    dgate, dup, a = launch_swiglu_bwd(torch.mm(dy, w_down), gate, up)
    return _matmuls_bwd(dy, x, w_gate, w_up, dgate, dup, a, needs)


def cost(N: int, D: int, F: int, itemsize: int) -> dict[str, int]:
    """Least bytes to move, and FLOPs of the matmuls, with `itemsize` bytes per element.

    Forward: read x and the weights; write y, g and u. Backward: read dy and these tensors except y;
    write dx and the gradients of the weights.
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
    x, w_gate, w_up, w_down, _ = inputs
    _, gate, up = output
    # Do not allocate zeros for the gradients of g and u: nobody uses them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_gate, w_up, w_down, gate, up)


def _grad(ctx, dy, _dgate, _dup):
    if dy is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:4]
    return *keep_needed(_bwd(dy, *ctx.saved_tensors, needs), needs), None


_fwd.register_autograd(_grad, setup_context=_save)


@public
def swiglu_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Compute silu(x w_gate^T) * (x w_up^T), and apply a third linear layer to it.

    Args:
        x: (..., D), float32, bfloat16 or float16 (on the CPU also float64), any layout.
        w_gate, w_up: (F, D), as nn.Linear stores them, dtype and device of x. SiLU is applied to
            the output of w_gate. torch.autocast casts x and all weights.
        w_down: (D, F), like w_gate.
    Returns: (..., D), dtype of x, or the autocast dtype.
    Raises: ValueError if shapes, dtypes or devices do not match. TypeError for float64 on a GPU.
    """
    x, w_gate, w_up, w_down = autocast(x, w_gate, w_up, w_down)
    check_x("swiglu_mlp", x)
    D = x.shape[-1]
    check_parameter("swiglu_mlp", "w_gate", w_gate, ("F", D), x)
    check_parameter("swiglu_mlp", "w_up", w_up, tuple(w_gate.shape), x)
    check_parameter("swiglu_mlp", "w_down", w_down, (D, w_gate.shape[0]), x)
    y, _, _ = _fwd(as_rows(x), w_gate, w_up, w_down, "auto")
    return like_rows_of(x, y)
