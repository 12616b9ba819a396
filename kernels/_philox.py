"""Philox 4x32-10 in PyTorch: counter-based random bits, the same ones `tl.randint` gives a kernel.

Source     Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57


def random_bits(seed: Tensor, counter: Tensor) -> Tensor:
    """Draw 32 random bits for each counter.

    Args:
        seed: () int64.
        counter: any shape, int64, >= 0.
    Returns: shape of counter, int64 with values in [0, 2**32).
    """
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # A 32 x 32 bit product may wrap into int64's sign; shift and mask still give its halves.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((product_b >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((product_a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product_b & _LOW, product_a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0
