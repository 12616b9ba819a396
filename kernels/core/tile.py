"""Constants and jitted functions that kernels share: arithmetic on tiles, no loads or stores."""

from .triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    return tl.where(squared < 0.0625, near, tl.where(x < 0, -far, far))
