"""Sums over rows in two stages of fixed order: programs write a row of partial sums each, one more launch adds these up."""

import torch
from torch import Tensor

from .triton import cdiv, tl, triton

COLUMNS_PER_PROGRAM, PARTIALS_PER_STEP = 32, 64


@triton.jit
def _partial_sums_kernel(
    a_partial_ptr, b_partial_ptr, a_ptr, b_ptr,
    P, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N columns and adds up their P partial sums; b may be None."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    a = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    b = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < P)[:, None] & mask_n[None, :]
        a += tl.load(a_partial_ptr + offs_p[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
        if b_partial_ptr is not None:
            b += tl.load(
                b_partial_ptr + offs_p[:, None] * N + offs_n[None, :], mask=mask, other=0.0
            )
    tl.store(a_ptr + offs_n, tl.sum(a, axis=0).to(a_ptr.dtype.element_ty), mask=mask_n)
    if b_partial_ptr is not None:
        tl.store(b_ptr + offs_n, tl.sum(b, axis=0).to(b_ptr.dtype.element_ty), mask=mask_n)


def sum_partials(
    a_partial: Tensor, a: Tensor, b_partial: Tensor | None = None, b: Tensor | None = None
) -> None:
    """Write to `a` (N,) the sum of the rows of `a_partial` (P, N) float32, and the same for b."""
    P, N = a_partial.shape
    _partial_sums_kernel[(cdiv(N, COLUMNS_PER_PROGRAM),)](
        a_partial_ptr=a_partial, b_partial_ptr=b_partial, a_ptr=a, b_ptr=b, P=P, N=N,
        BLOCK_P=PARTIALS_PER_STEP, BLOCK_N=COLUMNS_PER_PROGRAM,
    )  # fmt: skip


def empty_partials(programs: int, x: Tensor) -> Tensor:
    """Room for the partial sums of the columns of `x`, (programs, N) float32."""
    return torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device)
