"""Jitted helpers that kernels share: arithmetic on tiles, no loads or stores."""

from .triton import tl, triton


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, to a few units in the last place: exponentials far from zero, a polynomial near it."""
    squared = x * x
    # Around zero 1 - e cancels; the series is cut where its next term is below float32's resolution at |x| = 0.25.
    near = x + x * squared * (
        -1 / 3 + squared * (2 / 15 + squared * (-17 / 315 + squared * (62 / 2835)))
    )
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|): no overflow
    far = (1 - e) / (1 + e)
    return tl.where(squared < 0.0625, near, tl.where(x < 0, -far, far))
