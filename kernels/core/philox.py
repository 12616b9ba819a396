"""Philox 4x32-10 in PyTorch: counter-based random bits, equal to those of `tl.randint4x`.

Source     Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
"""

import torch
from torch import Tensor

# Masks of a 32-bit word, and the constants of the paper.
_LOW, _SIGN = 0xFFFFFFFF, 0x80000000
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57


def random_words(seed: Tensor, counter: Tensor) -> list[Tensor]:
    """Draw four words of 32 random bits per counter.

    Args:
        seed: () int64.
        counter: any shape, int64, >= 0.
    Returns: four tensors of the shape of counter, int64, values in [-2**31, 2**31): the bits read
        as a signed integer, as kernels see them.
    """
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The 64 bits of a multiplication may wrap into the sign of int64. Shift and mask still
        # give its high and low word.
        wide_a, wide_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((wide_b >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((wide_a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = wide_b & _LOW, wide_a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return [word - ((word & _SIGN) << 1) for word in (c0, c1, c2, c3)]


def random_bits(seed: Tensor, index: Tensor) -> Tensor:
    """Draw 32 random bits per index: word index % 4 of counter index // 4.

    Args:
        seed: () int64.
        index: any shape, int64, >= 0.
    Returns: shape of index, int64, values as in `random_words`.
    """
    w0, w1, w2, w3 = random_words(seed, index >> 2)
    is_odd = index & 1 > 0
    return torch.where(index & 2 > 0, torch.where(is_odd, w3, w2), torch.where(is_odd, w1, w0))
