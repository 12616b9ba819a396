"""Sums over rows in two stages of fixed order, without atomics: the result is deterministic.

First, each program of an operator's kernel writes one row of partial sums. Then the kernel of this
file adds up these rows.
"""

import torch
from torch import Tensor

from .launch import launch_kernel
from .triton import cdiv, tl, triton

COLUMNS_PER_PROGRAM = 32
PARTIALS_PER_STEP = 64


@triton.jit
def _sum_rows(partial_ptr, sum_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add up the P rows of BLOCK_N columns."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < P)[:, None] & mask_n[None, :]
        acc += tl.load(partial_ptr + offs_p[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    tl.store(sum_ptr + offs_n, tl.sum(acc, axis=0).to(sum_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["P_a", "P_b", "P_c"])
def _partial_sums_kernel(
    a_partial_ptr, b_partial_ptr, c_partial_ptr, a_ptr, b_ptr, c_ptr,
    P_a, P_b, P_c, N_a, N_b, N_c,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds up BLOCK_N columns of a, b or c. All of b and of c may be None."""
    pair = tl.program_id(1)
    if pair == 0:
        _sum_rows(a_partial_ptr, a_ptr, P_a, N_a, BLOCK_P, BLOCK_N)
    if b_partial_ptr is not None:  # noqa: SIM102 (the outer condition is a constant)
        if pair == 1:
            _sum_rows(b_partial_ptr, b_ptr, P_b, N_b, BLOCK_P, BLOCK_N)
    if c_partial_ptr is not None:  # noqa: SIM102
        if pair == 2:
            _sum_rows(c_partial_ptr, c_ptr, P_c, N_c, BLOCK_P, BLOCK_N)


def sum_partials(
    a_partial: Tensor,
    a: Tensor,
    b_partial: Tensor | None = None,
    b: Tensor | None = None,
    c_partial: Tensor | None = None,
    c: Tensor | None = None,
) -> None:
    """Write the sum of the rows of `a_partial` (P, N) float32 to `a` (N,). The same for b and c.

    Each pair has its own P and N. `b` is ignored if `b_partial` is None; the same for c.
    """
    (P_a, N_a), (P_b, N_b), (P_c, N_c) = (
        (None, None) if partial is None else partial.shape
        for partial in (a_partial, b_partial, c_partial)
    )
    pairs = 3 if c_partial is not None else 2 if b_partial is not None else 1
    blocks = cdiv(max(N_a, N_b or 0, N_c or 0), COLUMNS_PER_PROGRAM)
    launch_kernel(_partial_sums_kernel, (blocks, pairs),
        a_partial_ptr=a_partial, b_partial_ptr=b_partial, c_partial_ptr=c_partial,
        a_ptr=a, b_ptr=b, c_ptr=c,
        P_a=P_a, P_b=P_b, P_c=P_c, N_a=N_a, N_b=N_b, N_c=N_c,
        BLOCK_P=PARTIALS_PER_STEP, BLOCK_N=COLUMNS_PER_PROGRAM,
    )  # fmt: skip


def empty_partials(programs: int, x: Tensor) -> Tensor:
    """Allocate partial sums for the columns of x (..., N): (programs, N) float32, on its device."""
    return x.new_empty((programs, x.shape[-1]), dtype=torch.float32)
