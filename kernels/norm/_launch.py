"""Launchers of the kernels that layer_norm and rms_norm share: without a mean it is the latter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.device import DEFAULT_SM_COUNT, sm_count
from ..core.partial_sums import empty_partials, sum_partials
from ..core.triton import cdiv, next_power_of_2
from ._kernels import _layer_norm_bwd_kernel, _layer_norm_fwd_kernel
from ._wide_kernels import _layer_norm_bwd_wide_kernel, _layer_norm_fwd_wide_kernel

# Rows up to this many elements stay in registers; wider ones are walked in tiles of WIDE_BLOCK_N (_layer_norm_wide.py).
MAX_RESIDENT_WIDTH = 8_192
WIDE_BLOCK_N = 2_048
# Elements of a tile: 16 for each of 128 threads. The backward holds six such tiles, about 100 of a thread's registers.
TILE_ELEMENTS = 2_048


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Launch sizes. `wide`: rows are walked in tiles of block_n; else a tile holds whole rows."""

    wide: bool
    block_m: int
    block_n: int
    num_warps: int
    partials: int

    @property
    def tile(self) -> dict:
        """Keyword arguments of the row kernels."""
        rows = {} if self.wide else {"BLOCK_M": self.block_m}
        return {**rows, "BLOCK_N": self.block_n, "num_warps": self.num_warps}


def plan(M: int, N: int, sms: int = DEFAULT_SM_COUNT) -> Plan:
    """Choose tiles for M rows of N elements on a device of `sms` multiprocessors.

    Tiles have about TILE_ELEMENTS elements, several rows where rows are short. The backward starts four programs an SM, as
    many as its registers let run at once, each summing one row of partial weight gradients.
    """
    wide = N > MAX_RESIDENT_WIDTH
    block_n = WIDE_BLOCK_N if wide else next_power_of_2(max(N, 16))
    block_m = 1 if wide else min(max(1, TILE_ELEMENTS // block_n), next_power_of_2(M))
    num_warps = min(16, max(1, block_m * block_n // 512))
    return Plan(
        wide=wide,
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        partials=min(cdiv(M, block_m), 4 * sms),
    )


def launch_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return y, h (x itself without a residual), the mean of each row if it is `centered`, and rstd."""
    M, N = x.shape
    p = plan(M, N)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centered else None
    h = None
    if residual is not None:
        h = torch.empty((M, N), dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    kernel, rows = (
        (_layer_norm_fwd_wide_kernel, {}) if p.wide else (_layer_norm_fwd_kernel, {"M": M})
    )
    kernel[(cdiv(M, p.block_m),)](
        x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias, y_ptr=y, h_ptr=h, mean_ptr=mean, rstd_ptr=rstd,
        stride_xm=x.stride(0), stride_residual_m=0 if residual is None else residual.stride(0), **rows, N=N, eps=eps, **p.tile,
    )  # fmt: skip
    return y, x if h is None else h, mean, rstd


def launch_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dw and db (empty without a bias): row gradients and partial sums in one kernel, the other sums in another."""
    M, N = h.shape
    p = plan(M, N, sm_count(h.device))
    dx = torch.empty((M, N), dtype=h.dtype, device=h.device)
    dw, db = torch.empty_like(weight), weight.new_empty(N if has_bias else 0)
    dw_partial, db_partial = (
        empty_partials(p.partials, h),
        empty_partials(p.partials, h) if has_bias else None,
    )
    kernel = _layer_norm_bwd_wide_kernel if p.wide else _layer_norm_bwd_kernel
    kernel[(p.partials,)](
        dy_ptr=dy, dh_ptr=dh, h_ptr=h, weight_ptr=weight, mean_ptr=mean, rstd_ptr=rstd,
        dx_ptr=dx, dw_partial_ptr=dw_partial, db_partial_ptr=db_partial,
        stride_dym=dy.stride(0), stride_dhm=0 if dh is None else dh.stride(0), stride_hm=h.stride(0), M=M, N=N, **p.tile,
    )  # fmt: skip
    sum_partials(dw_partial, dw, db_partial, db)
    return dx, dw, db


def norm_cost(
    elements: int, itemsize: int, *, residual: bool, flops: tuple[int, int]
) -> dict[str, int]:
    """Least bytes to move, forward and backward, and FLOPs, of which an element takes `flops` in each."""
    forward, backward = (4, 4) if residual else (2, 3)
    return {
        "fwd_bytes": forward * elements * itemsize,
        "bwd_bytes": backward * elements * itemsize,
        "fwd_flops": flops[0] * elements,
        "bwd_flops": flops[1] * elements,
    }
