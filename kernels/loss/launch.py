"""Launchers of the kernels of cross_entropy and linear_cross_entropy, and their launch sizes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.device import arch, sm_count
from ..core.launch import launch_kernel
from ..core.triton import cdiv, next_power_of_2
from ._kernels import (
    _cross_entropy_bwd_kernel,
    _cross_entropy_fwd_bwd_kernel,
    _cross_entropy_fwd_kernel,
    _cross_entropy_reduce_kernel,
    _linear_cross_entropy_scale_kernel,
)
from .options import LossOptions

# Bytes of one load of one lane. Its address must be a multiple of this.
LOAD_BYTES = 16
# Bytes of rows that all running programs of the in-place kernel may hold, by the start of the
# architecture's name. The kernel reads each row twice. The second read comes from the L2 cache if
# the rows in flight fit. Estimates: 60 % of the L2 cache of a B200 (126 MB) and of an H100 or H200
# (50 MB).
ROWS_IN_FLIGHT_BYTES = {"sm_100": 75_000_000, "sm_": 30_000_000, "gfx": 30_000_000}
# Elements of a program that owns several short rows.
SHORT_ROWS_ELEMENTS = 1_024
REDUCE_BLOCK, SCALE_BLOCK = 8_192, 2_048


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The threads of a program that owns one long row.

    lanes: threads per program.   unroll: loads that a lane has in flight.
    programs: programs of the in-place kernel that run on a multiprocessor at once. The registers
        of their lanes limit them.
    """

    lanes: int
    unroll: int
    programs: int


# The first entry is for kernels that read each row once. The in-place kernel takes the first entry
# for which the logits of all running programs fit into ROWS_IN_FLIGHT_BYTES, else the last entry.
# Estimates from machine code, by the start of the architecture's name:
#   unroll    With two loads in flight, the exponentials that rescale the sums take 86 % of the time
#             that an H200 needs to load the logits. With eight loads, fewer programs fit on a
#             multiprocessor. On AMD, with all options and 16-bit logits, four loads spill 16 to 68
#             bytes, two loads at most 8.
#   lanes     A row of V = 50,304 logits in 16 bits has 100,608 bytes. With 5 programs of 128 lanes
#             on each of 132 multiprocessors, 66 MB of rows are in flight. With 2 programs of 512
#             lanes it is 27 MB. Both have at least 32 KB of loads in flight on a multiprocessor;
#             4.8 TB/s and 700 ns of latency need 25 KB.
LANES = {
    "sm_": (
        Lanes(lanes=128, unroll=4, programs=5),
        Lanes(lanes=512, unroll=2, programs=2),
        Lanes(lanes=512, unroll=4, programs=1),
    ),
    "gfx": (Lanes(lanes=128, unroll=2, programs=10),),
}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Launch sizes.

    block_m: rows per program.   lanes: threads of a program.   unroll: loads that a lane has in
    flight.   block_v: columns per load of all lanes.   vec: columns per load of one lane.
    """

    block_m: int
    lanes: int
    unroll: int
    block_v: int
    vec: int

    def arguments(self, architecture: str) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "UNROLL": self.unroll,
            "BLOCK_V": self.block_v,
            "VEC": self.vec,
            "num_warps": self.lanes // (64 if architecture.startswith("gfx") else 32),
        }


def plan(V: int, itemsize: int, architecture: str, *, sms: int = 0) -> Tile:
    """Choose the tile for rows of V elements of `itemsize` bytes.

    Args:
        sms: number of multiprocessors, for the in-place kernel, which reads each row twice. 0: the
            kernel reads each row once.
    """
    vec = LOAD_BYTES // itemsize
    choices = _of(architecture, LANES)
    most = _of(architecture, ROWS_IN_FLIGHT_BYTES) // (V * itemsize)  # rows in flight
    choice = next((row for row in choices if row.programs * sms <= most), choices[-1])
    block_v = choice.lanes * vec
    if block_v <= V:
        unroll = max(size for size in (1, 2, 4) if size <= choice.unroll and size * block_v <= V)
        return Tile(block_m=1, lanes=choice.lanes, unroll=unroll, block_v=block_v, vec=vec)
    block_v = next_power_of_2(max(V, 16))
    block_m = SHORT_ROWS_ELEMENTS // block_v
    return Tile(block_m=block_m, lanes=choice.lanes, unroll=1, block_v=block_v, vec=vec)


def _of(architecture: str, table: dict[str, Any]) -> Any:
    """Return the first value whose key `architecture` starts with."""
    return next(value for name, value in table.items() if architecture.startswith(name))


def empty_gradient(logits: Tensor) -> Tensor:
    """Allocate dlogits (N, V). Each row is aligned like the same row of the logits.

    Measured from row 0, row n of both tensors starts at the same distance from a multiple of
    LOAD_BYTES. Kernels can therefore load and store LOAD_BYTES at a time.
    """
    N, V = logits.shape
    stride = V + (logits.stride(0) - V) % (LOAD_BYTES // logits.itemsize)
    return torch.empty_strided((N, V), (stride, 1), dtype=logits.dtype, device=logits.device)


def launch_rows_fwd(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    loss: Tensor,
    statistics: Tensor | None,
    correct: Tensor | None = None,
    vocab_size: int | None = None,
) -> None:
    """Write each row's loss (N,) and, if given, two more results for each row.

    statistics (2, N) are top and log_sum. correct (N,) bool says whether no other column is above
    the target. Logits are the first `vocab_size` columns. Default: all.
    """
    grid, arguments = _arguments(logits, target, options, vocab_size)
    launch_kernel(_cross_entropy_fwd_kernel, grid,
        loss_ptr=loss, statistics_ptr=statistics, correct_ptr=correct, **arguments,
    )  # fmt: skip


def launch_rows_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    divisor: Tensor,
    options: LossOptions,
    dlogits: Tensor,
) -> None:
    """Write dlogits. `dloss` is (N,), one value per row, or (), one value for all rows."""
    grid, arguments = _arguments(logits, target, options)
    launch_kernel(_cross_entropy_bwd_kernel, grid,
        dloss_ptr=dloss, statistics_ptr=statistics, divisor_ptr=divisor, dlogits_ptr=dlogits,
        stride_dloss=dloss.stride(0) if dloss.ndim else 0, stride_dm=dlogits.stride(0),
        V_padded=logits.shape[1], **arguments,
    )  # fmt: skip


def launch_rows_fwd_bwd(
    logits: Tensor,
    target: Tensor,
    dloss: Tensor | None,
    options: LossOptions,
    loss: Tensor,
    statistics: Tensor | None = None,
    correct: Tensor | None = None,
    vocab_size: int | None = None,
) -> None:
    """Write each row's loss, and overwrite the logits with the gradient of sum_n dloss_n loss_n.

    `dloss` is (N,), or None for ones. `statistics` and `correct` are as for launch_rows_fwd. Logits
    are the first `vocab_size` columns; the gradient of the others is 0. Default: all.
    """
    sms = sm_count(logits.device)
    grid, arguments = _arguments(logits, target, options, vocab_size, sms=sms)
    launch_kernel(_cross_entropy_fwd_bwd_kernel, grid,
        dloss_ptr=dloss, loss_ptr=loss, statistics_ptr=statistics, correct_ptr=correct,
        stride_dloss=0 if dloss is None else dloss.stride(0), V_padded=logits.shape[1], **arguments,
    )  # fmt: skip


def launch_reduce(rows: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Reduce the losses of all rows. Kernel counterpart of reduce_losses, for weighted losses."""
    if options.reduction == "none":
        return rows, torch.ones((), dtype=torch.int64, device=rows.device)
    loss = torch.empty((), dtype=torch.float32, device=rows.device)
    divisor = torch.empty((), dtype=torch.int64, device=rows.device)
    launch_kernel(_cross_entropy_reduce_kernel, (1,),
        rows_ptr=rows, target_ptr=target, loss_ptr=loss, divisor_ptr=divisor,
        N=rows.shape[0], ignore_index=options.ignore_index,
        IS_MEAN=options.reduction == "mean", BLOCK_N=REDUCE_BLOCK, num_warps=16,
    )  # fmt: skip
    return loss, divisor


def launch_scale(
    dloss: Tensor,
    divisor: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply gradients by dloss / divisor. Convert dw and db to `weight_dtype`."""
    dtypes = (dx.dtype, weight_dtype, weight_dtype)
    scaled = []
    for grad, dtype in zip((dx, dw, db), dtypes, strict=True):
        out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
        launch_kernel(_linear_cross_entropy_scale_kernel, (cdiv(grad.numel(), SCALE_BLOCK),),
            grad_ptr=grad, dloss_ptr=dloss, divisor_ptr=divisor, out_ptr=out,
            numel=grad.numel(), BLOCK_N=SCALE_BLOCK,
        )  # fmt: skip
        scaled.append(out)
    return tuple(scaled)


def _arguments(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    vocab_size: int | None = None,
    *,
    sms: int = 0,
) -> tuple[tuple[int], dict]:
    """The grid and the arguments that all kernels of rows share. See `plan` for `sms`."""
    N = logits.shape[0]
    V = logits.shape[1] if vocab_size is None else vocab_size
    architecture = arch(logits.device)
    tile = plan(V, logits.itemsize, architecture, sms=sms)
    return (cdiv(N, tile.block_m),), {
        "logits_ptr": logits, "target_ptr": target, "stride_m": logits.stride(0), "N": N, "V": V,
        "ignore_index": options.ignore_index, "z_loss": options.z_loss,
        # None removes the option's code from the kernel. Label smoothing of 0.0 would multiply a
        # column of -inf by 0 and give NaN.
        "softcap": options.softcap or None, "label_smoothing": options.label_smoothing or None,
        **tile.arguments(architecture),
    }  # fmt: skip
