"""Comparisons of several tensors at once, and checks of registered operators."""

import pytest
import torch

from tritium.kernels.core.op import INTERPRET

# Marks of a case that takes the same paths through a kernel as another case of its test. Only the
# run of slow tests interprets it. The plain run and a GPU run it always.
slow_to_interpret = [pytest.mark.slow] if INTERPRET else []


def assert_equal(got, expected):
    """Each pair of tensors is bitwise equal."""
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def assert_close(got, expected, **tolerance):
    """Each pair of tensors passes torch.testing.assert_close."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def opcheck(operator, arguments):
    """Check the registration of an operator with torch.library.opcheck.

    Under the interpreter, only run the checks that look at what the kernel returns and changes. The
    other checks are of autograd and tracing. The plain run has them. Tracing takes seconds: for
    operators of a backward the tests of compiled gradients trace it.
    """
    checks = ("test_schema", "test_faketensor")
    if not INTERPRET:
        checks += ("test_autograd_registration",)
        if not operator.name().endswith(("_bwd", "_add")):
            checks += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(operator, arguments, test_utils=checks)
