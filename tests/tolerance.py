"""The one bar for numerical error: no tolerance is written anywhere else.

What is tested is compared with the float64 truth, and so is the same computation as PyTorch does it in the same dtype. Ours may
be off by 1.5 times as much as PyTorch, or by what rounding alone explains: one rounding of the result to its dtype, and in
float32 the ROUNDINGS of the elementwise operations that an element passes through and those of a sum of `length` terms, which
add up like a random walk. Each is half a unit in the last place.
"""

import math

import torch
from torch import Tensor

FACTOR = 1.5
ROUNDINGS = 8


def walk(a: Tensor, b: Tensor) -> float:
    """The largest root, over the elements of a b, of the sum of its terms' squares: how far their relative errors walk."""
    return (a.square() @ b.square()).max().sqrt().item()


def assert_accurate(
    name: str, got: Tensor, truth: Tensor, peer: Tensor, *,
    length: int = 1, scale: float = 0.0, terms: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Fail if `got` is further from `truth` than the bar.

    Args:
        name: what it is, for the message.
        got, truth, peer: one shape; tested value, float64 truth, PyTorch's value in the dtype of got.
        length: how many terms the longest sum behind one element has.
        scale: magnitude of the terms that cancel on the way, where it is above that of the truth itself.
        terms: the dtype in which these are rounded; that of got by default.
    """
    assert got.shape == truth.shape, (
        f"{name}: shape {tuple(truth.shape)} expected, got {tuple(got.shape)}"
    )
    assert got.dtype == peer.dtype, f"{name}: {peer.dtype} expected, got {got.dtype}"
    if got.numel() == 0:
        return
    got, truth, peer, eps = (
        got.double().cpu(),
        truth.double().cpu(),
        peer.double().cpu(),
        torch.finfo(got.dtype).eps,
    )
    assert torch.equal(got.isfinite(), truth.isfinite()), (
        f"{name}: {(~got.isfinite()).sum()} elements are not finite"
    )
    error, peer_error = (got - truth).abs().max().item(), (peer - truth).abs().max().item()
    size, terms_eps = truth.abs().max().item(), eps if terms is None else torch.finfo(terms).eps
    in_float32 = (ROUNDINGS + math.sqrt(length)) * torch.finfo(torch.float32).eps
    rounding = max(eps * size, terms_eps * scale) / 2 + in_float32 * max(scale, size) / 2
    bar = max(FACTOR * peer_error, rounding)
    assert error <= bar, (
        f"{name}: error {error:.3g} is above {bar:.3g} (PyTorch's {peer_error:.3g}, rounding {rounding:.3g})"
    )
