"""Philox 4x32-10 in PyTorch: counter-based random bits, the same ones `tl.randint4x` gives a kernel.

Source     Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
"""

import torch
from torch import Tensor

_LOW, _SIGN = 0xFFFFFFFF, 0x80000000
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57


def random_bits(seed: Tensor, index: Tensor) -> Tensor:
    """Draw 32 random bits for each index: word index % 4 of the four that counter index // 4 gives.

    Args:
        seed: () int64.
        index: any shape, int64, >= 0.
    Returns: shape of index, int64 with values in [-2**31, 2**31), as kernels see the bits in a signed register.
    """
    counter = index >> 2
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
    word = torch.where(
        index & 2 > 0, torch.where(index & 1 > 0, c3, c2), torch.where(index & 1 > 0, c1, c0)
    )
    return word - ((word & _SIGN) << 1)
