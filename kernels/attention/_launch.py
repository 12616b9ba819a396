"""Launchers of causal attention: tiles by architecture and head size, descriptors where alignment allows, order of heads.

Rows are ranked by the machine code they compile to (`tritium bench codegen`): no spilled registers, matrix instructions of the
architecture in every main loop, and the largest share of the matrix pipe that the other pipes leave. None has been timed yet.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.device import arch
from ..core.layout import descriptor, strides_bth
from ..core.triton import cdiv, next_power_of_2
from ._kernels import (
    _causal_attention_bwd_dkdv_kernel,
    _causal_attention_bwd_dq_kernel,
    _causal_attention_fwd_kernel,
)
from ._reference import check_documents, shapes_bwd, shapes_fwd, shapes_qkvpacked_bwd
from ._tiles import _causal_attention_schedule_kernel

# Keys and values of the heads that run at the same time are to stay in the L2, 40 MB or more on a data-center GPU.
L2_BYTES = 16 << 20
SLOTS_PER_PROGRAM, DOCUMENTS_PER_STEP = 64, 64


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Launch sizes of one kernel: queries and keys of a tile, warps of a program, tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def arguments(self, head_size: int) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "HEAD": head_size, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": padded(head_size),
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


def _rows(**directions: dict[int, tuple[int, int, int, int]]) -> dict[str, dict[int, Tile]]:
    names = ("block_m", "block_n", "num_warps", "num_stages")
    return {
        direction: {size: Tile(**dict(zip(names, row, strict=True))) for size, row in rows.items()}
        for direction, rows in directions.items()
    }


# By architecture (the start of its name), direction and largest padded head size: block_m, block_n, num_warps, num_stages. A
# tile of 128 owned rows halves what is read through the L2 against 64; the streamed side is as wide as registers allow.
TILES = {
    "sm_9": _rows(
        fwd={64: (128, 128, 4, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
        dq={64: (128, 64, 8, 3), 128: (128, 128, 8, 2), 256: (64, 32, 8, 2)},
        dkdv={64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
    ),
    "sm_10": _rows(
        fwd={64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
        dq={64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        # Two accumulators of 64 rows by 256 fill the tensor memory; with a window's third loop they are beyond it.
        dkdv={64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 32, 8, 1)},
    ),
    # These and the next keep to the 99 KB of shared memory that a program has on consumer cards.
    "sm_12": _rows(
        fwd={64: (128, 32, 4, 3), 128: (128, 32, 4, 2), 256: (64, 32, 8, 2)},
        dq={64: (128, 32, 4, 3), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
        dkdv={64: (32, 128, 8, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
    ),
    "sm_": _rows(
        fwd={64: (128, 32, 4, 3), 128: (128, 32, 4, 2), 256: (64, 32, 8, 2)},
        dq={64: (128, 32, 4, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        dkdv={64: (32, 128, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
    ),
    "gfx": _rows(
        fwd={64: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)},
        dq={64: (128, 64, 4, 1), 128: (64, 32, 4, 1), 256: (64, 16, 4, 1)},
        dkdv={64: (32, 128, 4, 1), 128: (32, 64, 4, 1), 256: (16, 64, 4, 1)},
    ),
}
# Products of float32 are not the matrix pipe's: they are exact, and their operands stand in registers.
FLOAT32_TILES = _rows(
    fwd={64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
    dq={64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
    dkdv={64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
)


def padded(head_size: int) -> int:
    """Columns of a tile: matrix instructions take no fewer than 16, and Triton powers of two."""
    return max(16, next_power_of_2(head_size))


def plan(
    direction: str, head_size: int, dtype: torch.dtype, architecture: str, dropout: bool = False
) -> Tile:
    """Choose the tile of a kernel, "fwd", "dq" or "dkdv"."""
    family = next(rows for name, rows in TILES.items() if architecture.startswith(name))
    rows = (FLOAT32_TILES if dtype == torch.float32 else family)[direction]
    tile = rows[min(size for size in rows if size >= padded(head_size))]
    if not dropout:
        return tile
    # The generator's words take as many registers as the scores: half of them at a time.
    walked = "block_m" if direction == "dkdv" else "block_n"
    return replace(tile, **{walked: max(16, getattr(tile, walked) // 2)})


def launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kernel counterpart of `reference_fwd`."""
    check_documents("causal_attention_varlen", cu_seqlens, q.shape[1])
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    group, tile = H // max(1, G), plan("fwd", K, q.dtype, arch(q.device), dropout_p > 0)
    o, lse = _cleared(
        cu_seqlens, *shapes_fwd(q, k, v, cu_seqlens, seed, scale, window, softcap, dropout_p)
    )
    work, tiles = _schedule(cu_seqlens, T, tile.block_m)
    kv_bytes = 2 * S * K * k.element_size()
    _causal_attention_fwd_kernel[(tiles * B * H,)](
        q_ptr=q, **_streamed(tile.block_n, k=k, v=v), work_ptr=work, cu_seqlens_ptr=cu_seqlens, seed_ptr=seed,
        o_ptr=o, lse_ptr=lse, **strides_bth(q=q, k=k, v=v),
        T=T, S=S, H=H, group=group, tiles=tiles, heads=B * H, heads_at_once=_heads_at_once(kv_bytes) * group,
        **_options(scale, window, S, softcap, dropout_p), **tile.arguments(K),
    )  # fmt: skip
    return o, lse


def launch_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Kernel counterpart of `reference_bwd`."""
    grads = shapes_bwd(
        do, dlse, q, k, v, o, lse, cu_seqlens, seed, scale, window, softcap, dropout_p
    )
    _cleared(cu_seqlens, *grads)
    _launch_grads(
        grads, do, dlse, q, k, v, o, lse, cu_seqlens, seed, scale, window, softcap, dropout_p
    )
    return grads


def launch_qkvpacked_fwd(
    qkv: Tensor, n_head: int, n_kv_head: int, cu_seqlens: Tensor | None, seed: Tensor | None,
    scale: float, window: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kernel counterpart of `reference_qkvpacked_fwd`."""
    check_documents("causal_attention_qkvpacked", cu_seqlens, qkv.shape[1])
    o, lse = launch_fwd(
        *_parts(qkv, n_head, n_kv_head), cu_seqlens, seed, scale, window, softcap, dropout_p
    )
    return o.flatten(2), lse


def launch_qkvpacked_bwd(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    n_head: int, n_kv_head: int, scale: float, window: int, softcap: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Kernel counterpart of `reference_qkvpacked_bwd`."""
    dqkv = shapes_qkvpacked_bwd(
        do, qkv, o, lse, cu_seqlens, seed, n_head, n_kv_head, scale, window, softcap, dropout_p
    )
    _cleared(cu_seqlens, dqkv)
    do, o = (x.unflatten(-1, (n_head, -1)) for x in (do, o))
    parts = _parts(qkv, n_head, n_kv_head)
    _launch_grads(
        _parts(dqkv, n_head, n_kv_head),
        do,
        None,
        *parts,
        o,
        lse,
        cu_seqlens,
        seed,
        scale,
        window,
        softcap,
        dropout_p,
    )
    return dqkv


def _parts(qkv: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v (B, T, heads, K) where a linear layer wrote them."""
    return qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1)).split(
        (n_head, n_kv_head, n_kv_head), dim=2
    )


def _cleared(cu_seqlens: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeros where there are documents: tokens of none are no program's, and NaN left there would outlive a product with 0."""
    return tensors if cu_seqlens is None else tuple(x.zero_() for x in tensors)


def _launch_grads(
    grads: tuple[Tensor, Tensor, Tensor], do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    lse: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None, scale: float, window: int, softcap: float, dropout_p: float,
) -> None:  # fmt: skip
    """Write dq, dk and dv into `grads`, whose heads lie side by side; dk and dv share their strides."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    dq, dk, dv = grads
    group, delta = H // max(1, G), torch.empty_like(lse)
    tile = plan("dq", K, q.dtype, arch(q.device), dropout_p > 0)
    work, tiles = _schedule(cu_seqlens, T, tile.block_m)
    common = {
        "cu_seqlens_ptr": cu_seqlens, "seed_ptr": seed, **strides_bth(do=do, q=q, k=k, v=v),
        "T": T, "S": S, "H": H, "group": group, **_options(scale, window, S, softcap, dropout_p),
    }  # fmt: skip
    kv_bytes, q_bytes = 2 * S * K * k.element_size(), 2 * T * K * q.element_size() * group
    _causal_attention_bwd_dq_kernel[(tiles * B * H,)](
        do_ptr=do, dlse_ptr=dlse, q_ptr=q, **_streamed(tile.block_n, k=k, v=v), o_ptr=o, lse_ptr=lse,
        work_ptr=work, delta_ptr=delta, dq_ptr=dq,
        stride_dqb=dq.stride(0), stride_dqt=dq.stride(1),
        tiles=tiles, heads=B * H, heads_at_once=_heads_at_once(kv_bytes) * group, **common, **tile.arguments(K),
    )  # fmt: skip
    listed, tile = tile.block_m, plan("dkdv", K, q.dtype, arch(q.device), dropout_p > 0)
    if cu_seqlens is None or tile.block_n != listed:
        work, tiles = _schedule(cu_seqlens, S, tile.block_n)
    _causal_attention_bwd_dkdv_kernel[(tiles * B * G,)](
        **_streamed(tile.block_m, do=do, q=q), k_ptr=k, v_ptr=v,
        **{name: _statistics(x, q, cu_seqlens, tile.block_m) for name, x in (("lse", lse), ("delta", delta))},
        work_ptr=work, dk_ptr=dk, dv_ptr=dv,
        stride_dkb=dk.stride(0), stride_dkt=dk.stride(1),
        tiles=tiles, heads=B * G, heads_at_once=_heads_at_once(q_bytes), **common, **tile.arguments(K),
    )  # fmt: skip


def _schedule(cu_seqlens: Tensor | None, tokens: int, block: int) -> tuple[Tensor | None, int]:
    """The list of tiles of packed documents, (tiles, 2), and how many programs a head needs; no list for one sequence."""
    if cu_seqlens is None:
        return None, cdiv(tokens, block)
    documents = cu_seqlens.shape[0] - 1
    tiles = tokens // block + documents
    work = torch.full((tiles, 2), -1, dtype=torch.int32, device=cu_seqlens.device)
    _causal_attention_schedule_kernel[(cdiv(tiles, SLOTS_PER_PROGRAM),)](
        cu_seqlens_ptr=cu_seqlens, work_ptr=work, tiles=tiles, documents=documents,
        BLOCK=block, BLOCK_T=SLOTS_PER_PROGRAM, BLOCK_D=DOCUMENTS_PER_STEP,
    )  # fmt: skip
    return work, tiles


def _heads_at_once(bytes_per_head: int) -> int:
    return max(1, L2_BYTES // max(1, bytes_per_head))


def _streamed(rows: int, **tensors: Tensor) -> dict:
    """Each (B, T, H, K) tensor as a descriptor of `rows` tokens of one head, or as it is where none can be had.

    Not of float32, whose products are formed from registers: what came through a descriptor takes twice as many of them.
    """
    return {
        name: x if x.dtype == torch.float32 else descriptor(x, (1, rows, 1, padded(x.shape[-1])))
        for name, x in tensors.items()
    }


def _statistics(x: Tensor, q: Tensor, cu_seqlens: Tensor | None, rows: int):
    """(B, H, T) numbers beside q as a descriptor of `rows` of them, or as they are where documents begin anywhere."""
    return (
        x
        if cu_seqlens is not None or q.dtype == torch.float32
        else descriptor(x.flatten(0, 1), (1, rows))
    )


def _options(scale: float, window: int, S: int, softcap: float, dropout_p: float) -> dict:
    """What does not apply is None: kernels are compiled without it."""
    return {
        "scale": scale,
        "window": window if window < S else None,
        "softcap": softcap if softcap > 0 else None,
        # Words of the generator are compared as signed numbers.
        "threshold": int(dropout_p * 2**32) - 2**31 if dropout_p > 0 else None,
        "keep": 1 - dropout_p if dropout_p > 0 else None,
    }
