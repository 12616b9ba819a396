"""Launchers of the kernels that cross_entropy and linear_cross_entropy share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.device import arch
from ..core.triton import cdiv, next_power_of_2
from ._kernels import (
    _cross_entropy_bwd_kernel,
    _cross_entropy_fwd_bwd_kernel,
    _cross_entropy_fwd_kernel,
    _cross_entropy_reduce_kernel,
)
from ._rows import LOAD_BYTES, Options

# Lanes of a program: 4 warps, 2 of AMD's.
LANES = 128
# Loads that a lane has in flight, by architecture (the start of its name). With two the exponentials that lanes spend on their
# maxima take 86 % of the clocks that an H200's memory needs, with eight fewer programs fit; on AMD four spill 16 to 68
# bytes where all options meet 16 bits, two 8 at most (estimates, from machine code).
UNROLL = {"sm_": 4, "gfx": 2}
# Elements that rows too short for one program alone have together.
SHORT_ROWS_ELEMENTS = 1_024
REDUCE_BLOCK = 8_192


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Launch sizes: rows of a program, loads that a lane has in flight, columns that one load of all lanes takes, or of one."""

    block_m: int
    unroll: int
    block_v: int
    vec: int

    def arguments(self, architecture: str) -> dict[str, int]:
        """Keyword arguments of a launch."""
        wave = 64 if architecture.startswith("gfx") else 32
        sizes = {
            "BLOCK_M": self.block_m,
            "UNROLL": self.unroll,
            "BLOCK_V": self.block_v,
            "VEC": self.vec,
        }
        return {**sizes, "num_warps": LANES // wave}


def plan_tile(V: int, itemsize: int, architecture: str) -> Tile:
    """Choose the tile for rows of V elements of `itemsize` bytes."""
    vec = LOAD_BYTES // itemsize
    if LANES * vec <= V:
        most = next(unroll for name, unroll in UNROLL.items() if architecture.startswith(name))
        unroll = max(size for size in (1, 2, 4) if size <= most and size * LANES * vec <= V)
        return Tile(block_m=1, unroll=unroll, block_v=LANES * vec, vec=vec)
    block_v = next_power_of_2(max(V, 16))
    return Tile(block_m=SHORT_ROWS_ELEMENTS // block_v, unroll=1, block_v=block_v, vec=vec)


def _arguments(logits: Tensor, target: Tensor, options: Options) -> tuple[tuple[int], dict]:
    N, V = logits.shape
    architecture = arch(logits.device)
    tile = plan_tile(V, logits.itemsize, architecture)
    return (cdiv(N, tile.block_m),), {
        "logits_ptr": logits, "target_ptr": target, "stride_m": logits.stride(0), "N": N, "V": V,
        "ignore_index": options.ignore_index, "z_loss": options.z_loss,
        # None compiles what they need away; without smoothing a column of -inf must not reach the loss.
        "softcap": options.softcap or None, "label_smoothing": options.label_smoothing or None,
        **tile.arguments(architecture),
    }  # fmt: skip


def launch_rows_fwd(
    logits: Tensor, target: Tensor, options: Options, loss: Tensor, statistics: Tensor | None
) -> None:
    """Write the loss (N,) and, where asked for, the statistics (2, N) of each row."""
    grid, arguments = _arguments(logits, target, options)
    _cross_entropy_fwd_kernel[grid](loss_ptr=loss, statistics_ptr=statistics, **arguments)


def launch_rows_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    divisor: Tensor,
    options: Options,
    dlogits: Tensor,
) -> None:
    """Write the gradient of the logits, for an incoming gradient of each row, (N,), or one for all, ()."""
    grid, arguments = _arguments(logits, target, options)
    _cross_entropy_bwd_kernel[grid](
        dloss_ptr=dloss, statistics_ptr=statistics, divisor_ptr=divisor, dlogits_ptr=dlogits,
        stride_dloss=dloss.stride(0) if dloss.ndim else 0, stride_dm=dlogits.stride(0), **arguments,
    )  # fmt: skip


def launch_rows_fwd_bwd(
    logits: Tensor, target: Tensor, dloss: Tensor | None, options: Options, loss: Tensor
) -> None:
    """Write the loss of each row, and over the logits the gradient of the sum of all, weighted by `dloss` (N,) if given."""
    grid, arguments = _arguments(logits, target, options)
    _cross_entropy_fwd_bwd_kernel[grid](
        dloss_ptr=dloss,
        loss_ptr=loss,
        stride_dloss=0 if dloss is None else dloss.stride(0),
        **arguments,
    )


def launch_reduce(
    rows: Tensor, target: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `_cross_entropy.reduced`, of rows that are weighted already."""
    if reduction == "none":
        return rows, torch.ones((), dtype=torch.int64, device=rows.device)
    loss, divisor = (
        torch.empty((), dtype=dtype, device=rows.device) for dtype in (torch.float32, torch.int64)
    )
    _cross_entropy_reduce_kernel[(1,)](
        rows_ptr=rows, target_ptr=target, loss_ptr=loss, divisor_ptr=divisor, N=rows.shape[0], ignore_index=ignore_index,
        IS_MEAN=reduction == "mean", BLOCK_N=REDUCE_BLOCK, num_warps=16,
    )  # fmt: skip
    return loss, divisor
