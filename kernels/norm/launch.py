"""Launchers that layer_norm and rms_norm share. Without a mean the kernels compute rms_norm."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.device import DEFAULT_SM_COUNT, sm_count
from ..core.dropout import Dropout
from ..core.launch import launch_kernel
from ..core.partial_sums import empty_partials, sum_partials
from ..core.triton import cdiv, next_power_of_2
from ._kernels import _layer_norm_bwd_kernel, _layer_norm_fwd_kernel
from ._wide_kernels import _layer_norm_bwd_wide_kernel, _layer_norm_fwd_wide_kernel

# Rows of up to this many elements stay in registers (_kernels.py). Wider rows are read in tiles of
# WIDE_BLOCK_N elements (_wide_kernels.py).
MAX_RESIDENT_WIDTH = 8_192
WIDE_BLOCK_N = 2_048
# Elements of a tile: 16 for each of 128 threads. With all optional sums the backward takes up to
# 128 registers per thread on sm_90.
TILE_ELEMENTS = 2_048


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Launch sizes.

    Attributes:
        is_wide: read rows in tiles of block_n elements; else a tile holds whole rows.
        block_m, block_n: rows and columns of a tile.
        num_warps: warps per program.
        partials: programs of the backward, each with one row of partial sums.
        stages: 1: a program of the backward loads a block of rows when it needs it. 2 or more: it
            also loads the next stages - 1 blocks, into shared memory. Wide rows do not use it.
    """

    is_wide: bool
    block_m: int
    block_n: int
    num_warps: int
    partials: int
    stages: int

    @property
    def tile(self) -> dict[str, int]:
        """Keyword arguments of the kernels."""
        rows = {} if self.is_wide else {"BLOCK_M": self.block_m}
        return {**rows, "BLOCK_N": self.block_n, "num_warps": self.num_warps}


@functools.lru_cache(maxsize=1024)
def plan(
    M: int,
    N: int,
    sms: int = DEFAULT_SM_COUNT,
    *,
    tile_elements: int = TILE_ELEMENTS,
    stages: int = 1,
) -> Plan:
    """Choose launch sizes for M rows of N elements on a device with `sms` multiprocessors.

    A tile has about `tile_elements` elements: several rows if rows are short. The backward starts
    four programs per multiprocessor, as many as its registers allow to run at once.
    `tritium bench tune` compares other values of the last two arguments.
    """
    is_wide = N > MAX_RESIDENT_WIDTH
    block_n = WIDE_BLOCK_N if is_wide else next_power_of_2(max(N, 16))
    block_m = 1 if is_wide else min(max(1, tile_elements // block_n), next_power_of_2(M))
    num_warps = min(16, max(1, block_m * block_n // 512))
    partials = min(cdiv(M, block_m), 4 * sms)
    return Plan(
        is_wide=is_wide,
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        partials=partials,
        stages=stages,
    )


def launch_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout: Dropout,
    *,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return y, h (x itself without a residual), the mean of each row if `centered`, and rstd."""
    M, N = x.shape
    p = plan(M, N)
    y = x.new_empty((M, N))
    rstd = x.new_empty(M, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centered else None
    h, stride_residual_m = None, 0
    if residual is not None:
        h = x.new_empty((M, N), dtype=torch.promote_types(x.dtype, residual.dtype))
        stride_residual_m = residual.stride(0)

    # A program of the wide kernel owns exactly one row: it does not need M.
    rows = {} if p.is_wide else {"M": M}
    kernel = _layer_norm_fwd_wide_kernel if p.is_wide else _layer_norm_fwd_kernel
    launch_kernel(kernel, (cdiv(M, p.block_m),),
        x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias,
        y_ptr=y, h_ptr=h, mean_ptr=mean, rstd_ptr=rstd,
        stride_xm=x.stride(0), stride_residual_m=stride_residual_m,
        **rows, N=N, eps=eps, **dropout.arguments, **p.tile,
    )  # fmt: skip
    return y, x if h is None else h, mean, rstd


def launch_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    has_bias: bool,
    added_dtype: torch.dtype | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dresidual, dw, db, and the sums of the columns of dx in `added_dtype`.

    dresidual is empty without dropout, where it equals dx. dw is empty without a weight, db without
    a bias. A bias needs a weight. The sums are empty if `added_dtype` is None.

    One kernel writes dx and all partial sums. A second one adds up the partial sums.
    """
    M, N = h.shape
    p = plan(M, N, sm_count(h.device))
    dx = h.new_empty((M, N))
    has_dropout = dropout.dropout_p > 0
    dresidual = h.new_empty((M, N) if has_dropout else 0)
    parameter = h if weight is None else weight
    dw = parameter.new_empty(0 if weight is None else N)
    db = parameter.new_empty(N if has_bias else 0)
    dw_partial = None if weight is None else empty_partials(p.partials, h)
    db_partial = empty_partials(p.partials, h) if has_bias else None
    has_added = added_dtype is not None
    dadded = h.new_empty(N if has_added else 0, dtype=added_dtype)
    dadded_partial = empty_partials(p.partials, h) if has_added else None

    stages = {} if p.is_wide else {"STAGES": p.stages}
    kernel = _layer_norm_bwd_wide_kernel if p.is_wide else _layer_norm_bwd_kernel
    launch_kernel(kernel, (p.partials,),
        dy_ptr=dy, dh_ptr=dh, h_ptr=h, weight_ptr=weight, mean_ptr=mean, rstd_ptr=rstd,
        dx_ptr=dx, dresidual_ptr=dresidual if has_dropout else None,
        dw_partial_ptr=dw_partial, db_partial_ptr=db_partial, dadded_partial_ptr=dadded_partial,
        stride_dym=dy.stride(0), stride_dhm=0 if dh is None else dh.stride(0),
        stride_hm=h.stride(0), M=M, N=N, **dropout.arguments, **p.tile, **stages,
    )  # fmt: skip
    if weight is not None:
        sum_partials(dw_partial, dw, db_partial, db, dadded_partial, dadded)
    elif has_added:
        sum_partials(dadded_partial, dadded)
    return dx, dresidual, dw, db, dadded


def norm_cost(
    elements: int,
    itemsize: int,
    *,
    residual: bool,
    dropout: bool,
    fwd_flops: int,
    bwd_flops: int,
) -> dict[str, int]:
    """Return the least bytes to move and the FLOPs, forward and backward.

    `fwd_flops` and `bwd_flops` are per element. The forward reads x and writes y. With a residual
    it also reads the residual and writes h. The backward reads dy and h and writes dx. With a
    residual it also reads dh, and with dropout it also writes the gradient of the residual. Vectors
    of N elements and the FLOPs of random bits do not count.
    """
    fwd_tensors = 4 if residual else 2
    bwd_tensors = (4 if residual else 3) + dropout
    return {
        "fwd_bytes": fwd_tensors * elements * itemsize,
        "bwd_bytes": bwd_tensors * elements * itemsize,
        "fwd_flops": fwd_flops * elements,
        "bwd_flops": bwd_flops * elements,
    }
