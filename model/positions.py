"""Cosines and sines for RoPE and for sinusoidal positions: rows of POSITIONS in choices.py.

Shapes     position (T,) or (B, T): B sequences, T tokens; K head size
"""

import torch
from torch import Tensor

from .init import STANDARD_DEVIATION


def sinusoidal_table(rows: int, d_model: int, device: torch.device) -> Tensor:
    """Return the vectors of positions 0 to rows - 1, (rows, d_model) float32.

    Elements 2 i and 2 i + 1 are sine and cosine of position / 10000^(2 i / d_model), times the
    initial standard deviation of the embedding. In the paper, embedding and sinusoids have about
    the same size too.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5
    """
    angles = rope_tables(torch.arange(rows, device=device), d_model, 10_000.0)  # cosine, sine
    table = torch.stack(angles[::-1], dim=-1).flatten(1)[:, :d_model]
    return STANDARD_DEVIATION * table


def rope_tables(position: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of RoPE's angles position / base^(2 i / K).

    Args:
        position: (T,) or (B, T) integers.
        head_size: K.
        base: as config.rope_base.
    Returns: two tensors (T, K / 2) or (B, T, K / 2), float32.
    """
    pair = torch.arange(0, head_size, 2, device=position.device)
    angle = position.unsqueeze(-1) * base ** (-pair / head_size)
    return angle.cos(), angle.sin()
