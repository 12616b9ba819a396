"""Triton where it exists; where it does not (macOS, Windows), names enough to import the kernel files.

Kernel files take `triton` and `tl` from here. Without Triton their `@triton.jit` functions stay plain Python functions that
nobody calls: `_op.define_op` then runs the references on every device.
"""

import types

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
    triton = types.SimpleNamespace(jit=lambda function: function)
    tl = types.SimpleNamespace(constexpr=lambda value: value)
    TensorDescriptor = None


def cdiv(a: int, b: int) -> int:
    """Divide rounding up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n` (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


__all__ = ["HAS_TRITON", "TensorDescriptor", "cdiv", "next_power_of_2", "tl", "triton"]
