"""QK-norm and RoPE of the queries and keys in a packed qkv, in one pass over memory.

    forward    xhat = x r      r = 1 / sqrt(mean(x^2) + eps)      one r per head of a token
               h = xhat w      w is one gain (K,) for all query heads, another for all key heads
               y1 = h1 cos - h2 sin        y2 = h2 cos + h1 sin
    backward   dh1 = dy1 cos + dy2 sin     dh2 = dy2 cos - dy1 sin
               g = dh w        dx = r (g - xhat mean(g xhat))     dw = sum(dh xhat)
               dbias = sum of dx over tokens
    pairs      h1, h2 are elements i and i + K / 2 of a head

Without norm, h = x. Without RoPE, y = h. At least one of them is applied.

Shapes       qkv: (B, T, (H + 2 G) K)   qk: (B, T, H + G, K), y of all heads   w: (K,)
             cos, sin: (S, K / 2) with S >= T, or (B, T, K / 2)
Precision    arithmetic in float32; y and dx are rounded once to the dtype of qkv
Cost         memory-bound. Forward: x is read, y is written. Backward: dy is read, dx is written to
             the same memory; the norm also reads x
Determinism  each program of the backward writes one row of partial sums of dw and dbias.
             sum_partials adds up the rows in a fixed order
Source       Su et al. 2021, arXiv:2104.09864; Henry et al. 2020, arXiv:2010.04245
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.device import sm_count
from ..core.launch import launch_kernel
from ..core.layout import wide
from ..core.partial_sums import sum_partials
from ..core.rope import as_tables, check_tables
from ..core.triton import cdiv, next_power_of_2
from ._norm_rope_kernels import _norm_rope_bwd_kernel, _norm_rope_fwd_kernel


@dataclass(frozen=True, kw_only=True)
class NormRope:
    """Arguments of norm and RoPE that get no gradient.

    Fields:
        eps: added to the mean square of a head; unused without norm.
        cos, sin: tables of RoPE; None without RoPE.
    """

    eps: float = 0.0
    cos: Tensor | None = None
    sin: Tensor | None = None

    def of_one_sequence(self, B: int, T: int) -> "NormRope":
        """Return the same for B sequences of T tokens that became one sequence of B T tokens."""
        if self.cos is None:
            return self
        cos, sin = (
            table[..., :T, :].expand(B, T, -1).reshape(1, B * T, -1)
            for table in (self.cos, self.sin)
        )
        return NormRope(eps=self.eps, cos=cos, sin=sin)


def check_norm_rope(
    name: str,
    qkv: Tensor,
    head_size: int,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> NormRope:
    """Check the arguments of norm and RoPE. `name` is the operator for the messages."""
    if (cos is None) != (sin is None):
        given = "sin" if cos is None else "cos"
        raise ValueError(f"{name}: expected both cos and sin or neither, got only {given}")
    if cos is not None:
        if head_size % 2:
            raise ValueError(f"{name}: RoPE needs an even head size, got {head_size}")
        check_tables(name, cos, sin, head_size // 2, qkv, "qkv")
        cos, sin = as_tables(cos, sin, qkv.dtype)
    if (q_weight is None) != (k_weight is None):
        given = "k_norm_weight" if q_weight is None else "q_norm_weight"
        raise ValueError(
            f"{name}: expected both q_norm_weight and k_norm_weight or neither, got only {given}"
        )
    for label, weight in (("q_norm_weight", q_weight), ("k_norm_weight", k_weight)):
        if weight is None:
            continue
        fits = weight.shape == (head_size,) and weight.device == qkv.device
        if not fits or not weight.is_floating_point():
            raise ValueError(
                f"{name}: {label} must be floating point ({head_size},) on {qkv.device} to match "
                f"qkv, got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
            )
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name}: norm_eps must be at least 0, and finite, got {eps}")
    return NormRope(eps=float(eps), cos=cos, sin=sin)


# --- reference: the definition; also the CPU implementation, the shape rule and the test oracle


def queries_and_keys(qkv: Tensor, n_head: int, n_kv_head: int) -> Tensor:
    """Return the view (B, T, H + G, K) of the queries and keys in qkv."""
    B, T, width = qkv.shape
    heads = n_head + 2 * n_kv_head
    return qkv.view(B, T, heads, width // heads)[:, :, : n_head + n_kv_head]


def reference_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    norm_rope: NormRope,
) -> Tensor:
    """Return qk (B, T, H + G, K), contiguous, dtype of qkv."""
    y = wide(queries_and_keys(qkv, n_head, n_kv_head))
    if q_weight is not None:
        weight = torch.cat((q_weight.expand(n_head, -1), k_weight.expand(n_kv_head, -1)))
        y = (y * _rstd(y, norm_rope.eps)).mul_(weight)
    if norm_rope.cos is not None:
        y = _rotate(y, norm_rope, is_reversed=False)
    return y.to(qkv.dtype).contiguous()


def reference_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm_rope: NormRope,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys, q_weight and k_weight.

    dq (B, T, H, K) and dk (B, T, G, K) have the precision of `wide`, and so have the first two
    results. Gradients of weights are empty without norm.
    """
    x = queries_and_keys(qkv, dq.shape[2], dk.shape[2])
    x_q, x_k = x.split_with_sizes((dq.shape[2], dk.shape[2]), 2)
    dq, dq_weight = _part_bwd(dq, x_q, q_weight, norm_rope)
    dk, dk_weight = _part_bwd(dk, x_k, k_weight, norm_rope)
    return dq, dk, dq_weight, dk_weight


def _part_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, norm_rope: NormRope
) -> tuple[Tensor, Tensor]:
    """Return dx and dw of heads that share one weight."""
    g = dy if norm_rope.cos is None else _rotate(dy, norm_rope, is_reversed=True)
    if weight is None:
        return g, g.new_empty(0)
    x = wide(x)
    rstd = _rstd(x, norm_rope.eps)
    xhat = x * rstd
    terms = g * xhat
    dw = terms.sum((0, 1, 2)).to(weight.dtype)
    # mean(g xhat), with g after the multiplication by w.
    mean = (terms @ weight.to(terms.dtype)).unsqueeze(-1) / x.shape[-1]
    g = g * weight
    return g.addcmul_(xhat, mean, value=-1).mul_(rstd), dw


def _rstd(x: Tensor, eps: float) -> Tensor:
    """Return the reciprocal root mean square of each head (..., K), (..., 1)."""
    return torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1] + eps)


def _rotate(x: Tensor, norm_rope: NormRope, *, is_reversed: bool) -> Tensor:
    """Rotate the pairs of x (B, T, heads, K) by the angles, or by the negated angles."""
    T = x.shape[1]
    # (..., T, 1, K / 2)
    cos, sin = (
        table[..., :T, :].unsqueeze(-2).to(x.dtype) for table in (norm_rope.cos, norm_rope.sin)
    )
    if is_reversed:
        sin = -sin
    pairs = cos.shape[-1]
    y = x * torch.cat((cos, cos), -1)
    y[..., :pairs].addcmul_(x[..., pairs:], sin, value=-1)
    y[..., pairs:].addcmul_(x[..., :pairs], sin)
    return y


# --- launchers

# Elements of a tile: 16 for each of the 128 threads of a program.
TILE_ELEMENTS = 2_048
# Heads of a tile. They share the angles of a token.
TILE_HEADS = 4
# Programs per multiprocessor if programs write partial sums.
SUMMING_PROGRAMS = 8


@functools.lru_cache(maxsize=1024)
def plan(N: int, heads: int, K: int) -> dict[str, int]:
    """Choose the tile for N tokens with `heads` heads of K elements: arguments of the kernels."""
    block_p = next_power_of_2(cdiv(K, 2))
    block_h = min(TILE_HEADS, next_power_of_2(heads))
    block_t = min(max(1, TILE_ELEMENTS // (2 * block_p * block_h)), next_power_of_2(max(1, N)))
    return {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_P": block_p}


def launch_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    norm_rope: NormRope,
) -> Tensor:
    """Kernel counterpart of `reference_norm_rope`."""
    x = queries_and_keys(qkv, n_head, n_kv_head)
    B, T, heads, K = x.shape
    tile = plan(B * T, heads, K)
    y = x.new_empty(x.shape)
    programs = cdiv(B * T, tile["BLOCK_T"]) * cdiv(heads, tile["BLOCK_H"])
    launch_kernel(_norm_rope_fwd_kernel, (programs,),
        x_ptr=x, q_weight_ptr=q_weight, k_weight_ptr=k_weight, **_tables(norm_rope, B), y_ptr=y,
        stride_xb=x.stride(0), stride_xt=x.stride(1),
        N=B * T, T=T, H=n_head, heads=heads, eps=norm_rope.eps, HEAD=K, **tile,
    )  # fmt: skip
    return y


def launch_norm_rope_bwd(
    dqkv: Tensor,
    dbias: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    norm_rope: NormRope,
) -> tuple[Tensor, Tensor]:
    """Replace the gradients of y in contiguous dqkv by those of x. Return dq_weight and dk_weight.

    Columns of queries and keys in `dbias` ((H + 2 G) K,), if there is one, become the sums of
    their columns of dqkv over tokens.
    """
    dy = queries_and_keys(dqkv, n_head, n_kv_head)
    B, T, heads, K = dy.shape
    tile = plan(B * T, heads, K)
    has_norm = q_weight is not None
    groups, tiles = cdiv(B * T, tile["BLOCK_T"]), cdiv(heads, tile["BLOCK_H"])
    if has_norm or dbias is not None:
        groups = min(groups, cdiv(SUMMING_PROGRAMS * sm_count(qkv.device), tiles))
    x = queries_and_keys(qkv, n_head, n_kv_head)
    dw_sums = dy.new_empty((heads * groups, K), dtype=torch.float32) if has_norm else None
    dbias_sums = None
    if dbias is not None:
        dbias_sums = dy.new_empty((groups, heads * K), dtype=torch.float32)
    launch_kernel(_norm_rope_bwd_kernel, (groups * tiles,),
        dy_ptr=dy, x_ptr=x if has_norm else None, q_weight_ptr=q_weight, k_weight_ptr=k_weight,
        **_tables(norm_rope, B), dx_ptr=dy, dw_partial_ptr=dw_sums, dbias_partial_ptr=dbias_sums,
        stride_dyt=dy.stride(1), stride_xb=x.stride(0), stride_xt=x.stride(1),
        N=B * T, T=T, H=n_head, heads=heads, groups=groups, eps=norm_rope.eps, HEAD=K, **tile,
    )  # fmt: skip

    pairs = []
    if has_norm:
        dq_weight, dk_weight = torch.empty_like(q_weight), torch.empty_like(k_weight)
        dq_sums, dk_sums = dw_sums.split_with_sizes((n_head * groups, n_kv_head * groups))
        pairs += [dq_sums, dq_weight, dk_sums, dk_weight]
    else:
        dq_weight, dk_weight = dy.new_empty(0), dy.new_empty(0)
    if dbias is not None:
        pairs += [dbias_sums, dbias[: heads * K]]
    if pairs:
        sum_partials(*pairs)
    return dq_weight, dk_weight


def _tables(norm_rope: NormRope, B: int) -> dict:
    """Return the tables of RoPE and their strides as arguments of a kernel."""
    arguments = {}
    for name, table in (("cos", norm_rope.cos), ("sin", norm_rope.sin)):
        # A table without a batch axis gets one of stride 0: all sequences read the same rows.
        table = None if table is None else table.expand(B, *table.shape[-2:])
        strides = (0, 0) if table is None else table.stride()
        arguments |= {f"{name}_ptr": table}
        arguments |= {f"stride_{name}b": strides[0], f"stride_{name}t": strides[1]}
    return arguments
