"""Comparisons of several tensors at once."""

import torch


def assert_equal(got, expected):
    """Each pair of tensors is bitwise equal."""
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def assert_close(got, expected, **tolerance):
    """Each pair of tensors passes torch.testing.assert_close."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
