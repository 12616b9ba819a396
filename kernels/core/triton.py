"""Triton if it is installed, else stand-ins that let kernel files be imported (macOS, Windows).

Kernel files import `triton` and `tl` from here. Without Triton their `@triton.jit` functions are
plain Python functions that nobody calls: define_op then runs the references on every device.
"""

import types

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def _jit(function=None, **options):
        return _jit if function is None else function

    triton = types.SimpleNamespace(jit=_jit)
    tl = types.SimpleNamespace(constexpr=lambda value: value)
    TensorDescriptor = None


def cdiv(a: int, b: int) -> int:
    """Divide rounding up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`; 1 for n <= 1."""
    return 1 << max(0, n - 1).bit_length()


__all__ = ["HAS_TRITON", "TensorDescriptor", "cdiv", "next_power_of_2", "tl", "triton"]
