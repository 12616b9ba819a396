"""SwiGLU: SiLU of a gate times a second tensor.

    forward    a = silu(g) u    silu(g) = g s    s = 1 / (1 + exp(-g))
    backward   dg = da u (s + g s (1 - s))    du = da silu(g)

Shapes     g, u, a and their gradients: any shape, the same for all
Precision  any float dtype in, the same dtype out; float32 in between
Memory     keeps g and u for the backward
Cost       memory-bound: each tensor is read or written once; cost() gives bytes and FLOPs
Source     Shazeer 2020, arXiv:2002.05202

swiglu_mlp fuses SwiGLU with its linear layers. Use this operator if these layers are elsewhere, for
example in a tensor-parallel or quantized layer. Definition and kernels are in _epilogues.py.
"""

from torch import Tensor

from ..core.op import define_op, public
from ._epilogues import (
    launch_swiglu_bwd,
    launch_swiglu_fwd,
    reference_swiglu_bwd,
    reference_swiglu_fwd,
)

# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def reference_bwd(da: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    dgate, dup, _ = reference_swiglu_bwd(da, gate, up, want_a=False)
    return dgate, dup


# --- launchers


def launch_bwd(da: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_bwd`."""
    dgate, dup, _ = launch_swiglu_bwd(da, gate, up, want_a=False)
    return dgate, dup


def cost(elements: int, itemsize: int) -> dict[str, int]:
    """Return the least bytes to move and the approximate FLOPs, for this many elements."""
    return {
        "fwd_bytes": 3 * elements * itemsize,
        "bwd_bytes": 5 * elements * itemsize,
        "fwd_flops": 5 * elements,
        "bwd_flops": 11 * elements,
    }


# --- operator

_fwd = define_op("swiglu_fwd", launch=launch_swiglu_fwd, reference=reference_swiglu_fwd)
_bwd = define_op("swiglu_bwd", launch=launch_bwd, reference=reference_bwd)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grad(ctx, da):
    return _bwd(da.contiguous(), *ctx.saved_tensors)


_fwd.register_autograd(_grad, setup_context=_save)


@public
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up.

    Args:
        gate: any shape, float32, bfloat16 or float16 (on the CPU also float64). A tensor that is
            not contiguous is copied, for example half of a (..., 2 F) tensor.
        up: shape, dtype and device of gate.
    Returns: shape and dtype of gate, contiguous.
    Raises: ValueError if gate is not floating point or up does not match it. TypeError for float64
        on a GPU.
    """
    if not gate.is_floating_point():
        raise ValueError(f"swiglu: gate must be floating point, got {gate.dtype}; cast it")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"swiglu: up must be {gate.dtype} {tuple(gate.shape)} on {gate.device} like gate, "
            f"got {up.dtype} {tuple(up.shape)} on {up.device}"
        )
    return _fwd(gate.contiguous(), up.contiguous())
