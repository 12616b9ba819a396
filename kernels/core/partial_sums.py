"""Sums over rows in two stages of fixed order, without atomics: the result is deterministic.

First, each program of an operator's kernel writes one row of partial sums. Then the kernel of this
file adds up these rows.
"""

import torch
from torch import Tensor

from .triton import cdiv, tl, triton

COLUMNS_PER_PROGRAM = 32
PARTIALS_PER_STEP = 64


@triton.jit(do_not_specialize=["P"])
def _partial_sums_kernel(
    a_partial_ptr, b_partial_ptr, a_ptr, b_ptr,
    P, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up the P partial sums of BLOCK_N columns. b may be None."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    a = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    b = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < P)[:, None] & mask_n[None, :]
        a_ptrs = a_partial_ptr + offs_p[:, None] * N + offs_n[None, :]
        a += tl.load(a_ptrs, mask=mask, other=0.0)
        if b_partial_ptr is not None:
            b_ptrs = b_partial_ptr + offs_p[:, None] * N + offs_n[None, :]
            b += tl.load(b_ptrs, mask=mask, other=0.0)
    tl.store(a_ptr + offs_n, tl.sum(a, axis=0).to(a_ptr.dtype.element_ty), mask=mask_n)
    if b_partial_ptr is not None:
        tl.store(b_ptr + offs_n, tl.sum(b, axis=0).to(b_ptr.dtype.element_ty), mask=mask_n)


def sum_partials(
    a_partial: Tensor, a: Tensor, b_partial: Tensor | None = None, b: Tensor | None = None
) -> None:
    """Write the sum of the rows of `a_partial` (P, N) float32 to `a` (N,). The same for b."""
    P, N = a_partial.shape
    _partial_sums_kernel[(cdiv(N, COLUMNS_PER_PROGRAM),)](
        a_partial_ptr=a_partial, b_partial_ptr=b_partial, a_ptr=a, b_ptr=b, P=P, N=N,
        BLOCK_P=PARTIALS_PER_STEP, BLOCK_N=COLUMNS_PER_PROGRAM,
    )  # fmt: skip


def empty_partials(programs: int, x: Tensor) -> Tensor:
    """Allocate partial sums for the columns of x (..., N): (programs, N) float32, on its device."""
    return torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device)
