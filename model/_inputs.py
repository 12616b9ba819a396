"""Checks of the values that a GPT reads. They run on a CPU, where reading a value is free."""

import contextlib
import itertools

import torch
from torch import Tensor

from ..kernels.core.op import can_read_values, is_eager


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise IndexError for a token in the padding rows of the vocabulary, if reading it is free.

    The embedding itself checks that tokens are inside its table, padding rows included.
    """
    if tokens.device.type != "cpu" or not tokens.numel() or torch.compiler.is_compiling():
        return
    largest = 0
    with contextlib.suppress(RuntimeError):  # a fake tensor, or one inside vmap, has no value
        largest = int(tokens.max())
    if largest >= vocab_size:
        raise IndexError(f"GPT: tokens must be below the vocabulary {vocab_size}, got {largest}")


def check_documents(
    cu_seqlens: Tensor, sizes: tuple[int, int], context: int, spans_rows: bool
) -> None:
    """Raise ValueError for documents that the model does not support, if reading them is free.

    Args:
        cu_seqlens: as for GPT.forward.
        sizes: (B, T).
        context: maximum number of tokens of a document.
        spans_rows: whether a document can continue in the next row.
    """
    if not (is_eager(cu_seqlens) and can_read_values(cu_seqlens)):
        return
    B, T = sizes
    edges = cu_seqlens.tolist()
    is_flat = cu_seqlens.ndim == 1 and len(edges) > 1
    if not is_flat or edges[0] != 0 or edges[-1] != B * T or edges != sorted(edges):
        raise ValueError(
            f"GPT: cu_seqlens must rise from 0 to the {B * T} tokens of the batch, got "
            f"{edges[:20]}; give the cumulative sums of the documents' lengths"
        )
    longest = max(end - start for start, end in itertools.pairwise(edges))
    if longest > context:
        raise ValueError(
            f"GPT: context_tokens is {context}, got a document of {longest} tokens; "
            "shorten the document"
        )
    if not spans_rows and not set(range(0, B * T, max(T, 1))) <= set(edges):
        raise ValueError(
            f"GPT: a document must begin with each row of {T} tokens, got cu_seqlens "
            f"{edges[:20]}; set attention to tritium"
        )
