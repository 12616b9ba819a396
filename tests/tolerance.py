"""The one bar for numerical error. No other file contains a tolerance for kernels.

A tested value and a baseline, the same computation by PyTorch in the same dtype, are both compared
with the float64 truth. The error of the tested value may be the larger of

    1.5 times the error of the baseline;
    the error that rounding alone explains: one rounding of the result to its dtype, and in float32
    the ROUNDINGS of the elementwise operations that an element passes through and those of a sum of
    `length` terms. Rounding errors of a sum are independent, so they grow as sqrt(length).

Each rounding is half a unit in the last place. ROUNDINGS counts an exponential and a division once
each. On a GPU both are less exact: ex2.approx has a relative error of up to 2^-22, and div.full of
up to 2 units in the last place (PTX ISA, "Floating Point Instructions"). Each is 4 roundings, and
GPU_ROUNDINGS has the 6 that are missing.
"""

import math

import torch
from torch import Tensor

FACTOR = 1.5
ROUNDINGS = 8
GPU_ROUNDINGS = 6


def walk(a: Tensor, b: Tensor) -> float:
    """Return how far independent errors of the terms of a @ b add up, relative to one term's error.

    This is the root of the sum of the squared terms, the largest over all elements.
    """
    return (a.square() @ b.square()).max().sqrt().item()


def assert_accurate(
    name: str,
    got: Tensor,
    truth: Tensor,
    baseline: Tensor,
    *,
    length: int = 1,
    scale: float = 0.0,
    terms: torch.dtype | None = None,
) -> None:
    """Fail if `got` is further from `truth` than the bar.

    Args:
        name: name of the value, for the message.
        got: tested value.
        truth: its float64 truth, same shape.
        baseline: PyTorch's value, shape and dtype of got.
        length: number of terms of the longest sum behind one element.
        scale: magnitude of terms that cancel on the way, if it is above that of the truth.
        terms: the dtype in which these terms are rounded; default: that of got.
    """
    assert got.shape == truth.shape, (
        f"{name}: shape {tuple(truth.shape)} expected, got {tuple(got.shape)}"
    )
    assert got.dtype == baseline.dtype, f"{name}: {baseline.dtype} expected, got {got.dtype}"
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    roundings = ROUNDINGS + (GPU_ROUNDINGS if got.is_cuda else 0)
    terms_eps = eps if terms is None else torch.finfo(terms).eps
    got, truth, baseline = (value.double().cpu() for value in (got, truth, baseline))
    assert torch.equal(got.isfinite(), truth.isfinite()), (
        f"{name}: {(~got.isfinite()).sum()} elements are not finite"
    )
    error = (got - truth).abs().max().item()
    baseline_error = (baseline - truth).abs().max().item()
    size = truth.abs().max().item()
    in_float32 = (roundings + math.sqrt(length)) * torch.finfo(torch.float32).eps
    rounding = max(eps * size, terms_eps * scale) / 2 + in_float32 * max(scale, size) / 2
    bar = max(FACTOR * baseline_error, rounding)
    assert error <= bar, (
        f"{name}: error {error:.3g} is above {bar:.3g} "
        f"(baseline {baseline_error:.3g}, rounding {rounding:.3g})"
    )
