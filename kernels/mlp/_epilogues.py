"""Activations of linear and of the MLPs: GEMM epilogues, elementwise kernels, launchers.

    GELU       g(h) = h Phi(h)    g'(h) = Phi(h) + h phi(h)
               Phi: normal distribution function    phi: its density
    tanh form  g(h) = h s    g'(h) = s + s (1 - s) h du/dh
               s = sigmoid(u)    u = 2 sqrt(2 / pi) (h + C h^3)    C = 0.044715
               The usual h (1 + tanh(u / 2)) / 2 is the same function in more instructions.
    relu2      g(h) = max(h, 0)^2    g'(h) = 2 max(h, 0)
    SwiGLU     a = silu(g) u    dg = da u (s + g s (1 - s))    du = da silu(g)    s = sigmoid(g)

Shapes     h, a, g, u and their gradients: (N, F), contiguous, as the GEMMs write them
Precision  any float dtype in and out; float32 in between
Order      the gradient of a bias sums the rows of dh in two stages of fixed order
Cost       memory-bound: each tensor is read or written once
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.device import sm_count
from ..core.launch import launch_kernel
from ..core.layout import wide
from ..core.partial_sums import empty_partials, sum_partials
from ..core.tile import LOG2E
from ..core.triton import cdiv, tl, triton

# Elements per tile: each of 128 threads loads 16 bytes of bfloat16 twice. Tiles of kernels that
# also sum columns are COLUMNS wide.
BLOCK, COLUMNS = 2_048, 256
PROGRAMS_PER_SM = 8

SQRT_HALF, SQRT_1_OVER_2PI = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI, CUBIC = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)


# --- activations of a float32 tile, for the argument ACTIVATION: each returns value and derivative


@triton.jit
def _inverse(x):
    """1 / x for x >= 1, in two instructions instead of six, with twice the error of rsqrt."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _sigmoid(x):
    return _inverse(1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def gelu_tanh(h):
    """The tanh form of GELU."""
    # In float32 GELU is 0 or h for |h| >= 10. Without the clamp the polynomial could overflow.
    squared = tl.minimum(h * h, 100.0)
    e = tl.exp2(h * (squared * (-LOG2E * TWO_SQRT_2_OVER_PI * CUBIC) - LOG2E * TWO_SQRT_2_OVER_PI))
    s = _inverse(1.0 + e)
    # 1 - s is e s, without cancellation. If e is infinite, s is 0, and e s must be 0 too.
    rest = tl.minimum(e, 1e30) * s * h
    return h * s, s * (
        rest * (squared * (3.0 * TWO_SQRT_2_OVER_PI * CUBIC) + TWO_SQRT_2_OVER_PI) + 1.0
    )


@triton.jit
def gelu_erf(h):
    """Exact GELU."""
    normal = 0.5 + 0.5 * tl.erf(h * SQRT_HALF)
    return h * normal, normal + h * SQRT_1_OVER_2PI * tl.exp2(h * h * (-0.5 * LOG2E))


@triton.jit
def relu2(h):
    """The square of ReLU. NaN stays NaN."""
    positive = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive, 2.0 * positive


# --- epilogues, see gemm.py


@triton.jit
def _gelu_tanh_fwd(h, _):
    return gelu_tanh(h)[0]


@triton.jit
def _gelu_erf_fwd(h, _):
    return gelu_erf(h)[0]


@triton.jit
def _gelu_tanh_bwd(da, h):
    return da * gelu_tanh(h.to(tl.float32))[1]


@triton.jit
def _gelu_erf_bwd(da, h):
    return da * gelu_erf(h.to(tl.float32))[1]


@triton.jit
def _relu2_fwd(h, _):
    return relu2(h)[0]


@triton.jit
def _relu2_bwd(da, h):
    return da * relu2(h.to(tl.float32))[1]


@triton.jit
def swiglu(up, gate):
    gate = gate.to(tl.float32)
    return gate * _sigmoid(gate) * up


# --- the table of activations


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An activation in PyTorch and in kernels.

    Attributes:
        reference: h -> a.
        reference_bwd: da, h -> dh.
        tile: jitted function, float32 tile of h -> a and its derivative.
        epilogue_fwd: epilogue of the GEMM that computes h.
        epilogue_bwd: epilogue of the GEMM that computes da; its argument aux is h.
    """

    reference: Callable[[Tensor], Tensor]
    reference_bwd: Callable[[Tensor, Tensor], Tensor]
    tile: Any
    epilogue_fwd: Any
    epilogue_bwd: Any


def _gelu(approximate: str, **kernels: Any) -> Activation:
    return Activation(
        reference=lambda h: functional.gelu(h, approximate=approximate),
        reference_bwd=lambda da, h: torch.ops.aten.gelu_backward(da, h, approximate=approximate),
        **kernels,
    )


def _reference_relu2_bwd(da: Tensor, h: Tensor) -> Tensor:
    # In float16, 2 da would overflow for da above 32,752.
    return (wide(da) * (2 * functional.relu(wide(h)))).to(h.dtype)


ACTIVATIONS = {
    "gelu": _gelu("none", tile=gelu_erf, epilogue_fwd=_gelu_erf_fwd, epilogue_bwd=_gelu_erf_bwd),
    "gelu_tanh": _gelu(
        "tanh", tile=gelu_tanh, epilogue_fwd=_gelu_tanh_fwd, epilogue_bwd=_gelu_tanh_bwd
    ),
    "relu2": Activation(
        reference=lambda h: functional.relu(h).square(),
        reference_bwd=_reference_relu2_bwd,
        tile=relu2,
        epilogue_fwd=_relu2_fwd,
        epilogue_bwd=_relu2_bwd,
    ),
}


# --- references of SwiGLU


def reference_swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """Return a = silu(gate) up."""
    return functional.silu(wide(gate)).mul_(up).to(gate.dtype)


def reference_swiglu_bwd(
    da: Tensor, gate: Tensor, up: Tensor, *, want_a: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of gate and up, and a = silu(gate) up, or None if it is not wanted."""
    da, g = wide(da), wide(gate)
    s = torch.sigmoid(g)
    silu = g * s
    dgate = torch.addcmul(s, silu, 1 - s).mul_(da * up).to(gate.dtype)
    dup = (da * silu).to(up.dtype)
    return dgate, dup, (silu * up).to(gate.dtype) if want_a else None


# --- kernels: a program owns BLOCK elements, or COLUMNS columns of every P-th block of rows


@triton.jit
def _mlp_activation_fwd_kernel(
    h_ptr, a_ptr, numel, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < numel
    a, _ = ACTIVATION(tl.load(h_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32))
    tl.store(a_ptr + offs_n, a.to(a_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _mlp_activation_bwd_kernel(
    da_ptr, h_ptr, dh_ptr, db_partial_ptr,
    M, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dh and, unless `db_partial_ptr` is None, partial sums of its columns."""
    pid = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        offs = offs_m[:, None] * N + offs_n[None, :]
        _, slope = ACTIVATION(tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32))
        dh = tl.load(da_ptr + offs, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(dh_ptr + offs, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        db += dh
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + pid.to(tl.int64) * N + offs_n, tl.sum(db, axis=0), mask=mask_n)


@triton.jit
def _swiglu_fwd_kernel(gate_ptr, up_ptr, a_ptr, numel, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < numel
    gate = tl.load(gate_ptr + offs_n, mask=mask_n, other=0.0)
    up = tl.load(up_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(a_ptr + offs_n, swiglu(up, gate).to(a_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _swiglu_bwd_kernel(
    da_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, a_ptr, numel, BLOCK_N: tl.constexpr
):
    """Store the gradients of gate and up. Store a too, unless `a_ptr` is None."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < numel
    da = tl.load(da_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    s = _sigmoid(gate)
    silu = gate * s
    dgate = da * up * (s + silu * (1.0 - s))
    tl.store(dgate_ptr + offs_n, dgate.to(dgate_ptr.dtype.element_ty), mask=mask_n)
    tl.store(dup_ptr + offs_n, (da * silu).to(dup_ptr.dtype.element_ty), mask=mask_n)
    if a_ptr is not None:
        tl.store(a_ptr + offs_n, (silu * up).to(a_ptr.dtype.element_ty), mask=mask_n)


# --- launchers: allocate, launch by keyword


def launch_activation_fwd(h: Tensor, activation: str) -> Tensor:
    """Return the activation of h, a row of ACTIVATIONS."""
    a = torch.empty_like(h)
    launch_kernel(_mlp_activation_fwd_kernel, (cdiv(h.numel(), BLOCK),),
        h_ptr=h, a_ptr=a, numel=h.numel(), ACTIVATION=ACTIVATIONS[activation].tile, BLOCK_N=BLOCK,
    )  # fmt: skip
    return a


def launch_activation_bwd(da: Tensor, h: Tensor, activation: str, db: Tensor | None) -> Tensor:
    """Return dh. Write the sums of its columns to `db` (N,) if given."""
    M, N = h.shape
    dh = torch.empty_like(h)
    block_m = BLOCK // COLUMNS
    column_blocks = cdiv(N, COLUMNS)
    programs = PROGRAMS_PER_SM * sm_count(h.device) // column_blocks
    programs = max(1, min(cdiv(M, block_m), programs))
    db_partial = None if db is None else empty_partials(programs, h)
    launch_kernel(_mlp_activation_bwd_kernel, (programs, column_blocks),
        da_ptr=da, h_ptr=h, dh_ptr=dh, db_partial_ptr=db_partial, M=M, N=N,
        ACTIVATION=ACTIVATIONS[activation].tile, BLOCK_M=block_m, BLOCK_N=COLUMNS,
    )  # fmt: skip
    if db is not None:
        sum_partials(db_partial, db)
    return dh


def launch_swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """Kernel counterpart of `reference_swiglu_fwd`."""
    a = torch.empty_like(gate)
    launch_kernel(_swiglu_fwd_kernel, (cdiv(a.numel(), BLOCK),),
        gate_ptr=gate, up_ptr=up, a_ptr=a, numel=a.numel(), BLOCK_N=BLOCK,
    )  # fmt: skip
    return a


def launch_swiglu_bwd(
    da: Tensor, gate: Tensor, up: Tensor, *, want_a: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Kernel counterpart of `reference_swiglu_bwd`."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    a = torch.empty_like(gate) if want_a else None
    launch_kernel(_swiglu_bwd_kernel, (cdiv(gate.numel(), BLOCK),),
        da_ptr=da, gate_ptr=gate, up_ptr=up, dgate_ptr=dgate, dup_ptr=dup, a_ptr=a,
        numel=gate.numel(), BLOCK_N=BLOCK,
    )  # fmt: skip
    return dgate, dup, a
