"""Jitted functions that kernels share: arithmetic on tiles, without loads and stores."""

from .triton import tl, triton


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, accurate to a few units in the last place."""
    # Near zero, 1 - e below would lose digits, so use the Taylor series. For |x| < 0.25 its next
    # term is too small to change a float32.
    squared = x * x
    near = x + x * squared * (
        -1 / 3 + squared * (2 / 15 + squared * (-17 / 315 + squared * (62 / 2835)))
    )
    # Elsewhere: tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|), which cannot overflow.
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1 - e) / (1 + e)
    return tl.where(squared < 0.0625, near, tl.where(x < 0, -far, far))
