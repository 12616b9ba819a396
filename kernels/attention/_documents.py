"""Launch the kernels that prepare packed documents: list their tiles, and clear the padding."""

import math

import torch
from torch import Tensor

from ..core.launch import launch_kernel
from ..core.triton import cdiv
from ._tiles import _causal_attention_padding_kernel, _causal_attention_schedule_kernel

# Tile sizes of the kernel that lists the tiles of packed documents.
SLOTS_PER_PROGRAM, DOCUMENTS_PER_STEP = 64, 64
# Sizes of the kernel that fills padding with zeros: elements per step, and programs at most.
PADDING_BLOCK, PADDING_PROGRAMS = 1024, 128


def clear_padding(cu_seqlens: Tensor | None, x: Tensor, axis: int = 1) -> None:
    """Fill the tokens of contiguous `x` that are in no document with zeros.

    `axis` is the axis of tokens. No program of the other kernels writes these tokens. A NaN left
    there would survive a multiplication by 0.
    """
    if cu_seqlens is None or not x.numel():
        return
    rows = math.prod(x.shape[:axis])
    row_size = x.numel() // rows
    # The kernel learns on the device where padding is. Usually there is none.
    programs = min(cdiv(row_size, PADDING_BLOCK), PADDING_PROGRAMS)
    launch_kernel(_causal_attention_padding_kernel, (programs, rows),
        x_ptr=x, cu_seqlens_ptr=cu_seqlens, documents=cu_seqlens.shape[0] - 1,
        T=x.shape[axis], width=row_size // x.shape[axis], BLOCK=PADDING_BLOCK,
    )  # fmt: skip


def schedule(cu_seqlens: Tensor | None, tokens: int, block: int) -> tuple[Tensor | None, int]:
    """Return the list of tiles of packed documents (tiles, 2), and the number of programs per head.

    Without documents there is no list. The number of tiles that documents fill is known on the
    device only, so there is one program for every tile that there could be.
    """
    if cu_seqlens is None:
        return None, cdiv(tokens, block)
    documents = cu_seqlens.shape[0] - 1
    tiles = tokens // block + documents
    work = torch.full((tiles, 2), -1, dtype=torch.int32, device=cu_seqlens.device)
    launch_kernel(_causal_attention_schedule_kernel, (cdiv(tiles, SLOTS_PER_PROGRAM),),
        cu_seqlens_ptr=cu_seqlens, work_ptr=work, tiles=tiles, documents=documents,
        BLOCK=block, BLOCK_T=SLOTS_PER_PROGRAM, BLOCK_D=DOCUMENTS_PER_STEP,
    )  # fmt: skip
    return work, tiles
