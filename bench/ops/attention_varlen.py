"""Causal attention over packed documents of very different lengths, beside a loop over them and the flash-attention library."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels import causal_attention_varlen
from ...kernels.attention.causal import cost
from ...kernels.attention.launch import launch_bwd, launch_fwd
from ...kernels.attention.options import AttentionOptions
from .attention import eager, sdpa
from .case import Contestant, Operator, randn

# N, documents, H, K: a batch of GPT-2's as short texts, and a long context with few of them.
SHAPES = ((32768, 256, 12, 64), (32768, 16, 16, 128))
SMALL_SHAPES = ((512, 7, 2, 64),)


@functools.cache
def lengths(N: int, documents: int) -> tuple[int, ...]:
    """Lengths of documents, the same each time: exponentially distributed, so that few hold most of the N tokens."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.rand(documents, generator=generator, dtype=torch.float64).log_().neg_().cumsum(0)
    ends = (cuts / cuts[-1] * N).round().long()
    return tuple(ends.diff(prepend=ends.new_zeros(1)).tolist())


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    N, documents, H, K = shape
    ends = torch.tensor([0, *lengths(N, documents)]).cumsum(0)
    q, k, v = (randn(N, H, K, dtype=dtype, device=device) for _ in range(3))
    return {"q": q, "k": k, "v": v, "cu_seqlens": ends.to(device, torch.int32)}


def _ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return causal_attention_varlen(q, k, v, cu_seqlens, len(q))


def _each(dense: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        sizes = lengths(len(q), len(cu_seqlens) - 1)
        documents = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        return torch.cat([dense(*(x[None] for x in document))[0] for document in documents])

    return call


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(lengths(len(q), len(cu_seqlens) - 1))
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)


def _cost(shape: Sequence[int], itemsize: int) -> dict[str, int]:
    N, documents, H, K = shape
    each = [cost(1, T, T, H, H, K, itemsize) for T in lengths(N, documents)]
    return {name: sum(one[name] for one in each) for name in each[0]}


def _launches(shape: Sequence[int], dtype: torch.dtype) -> None:
    N, documents, H, K = shape
    q, lse = (
        torch.empty(1, N, H, K, dtype=dtype, device="meta"),
        torch.empty(1, H, N, device="meta"),
    )
    cu_seqlens = torch.empty(documents + 1, dtype=torch.int32, device="meta")
    options = AttentionOptions(scale=K**-0.5, window=N)
    launch_fwd(q, q, q, cu_seqlens, options)
    launch_bwd(q, None, q, q, q, q, lse, cu_seqlens, options)


ATTENTION_VARLEN = Operator(
    name="causal_attention_varlen", sizes=("N", "documents", "H", "K"), inputs=_inputs, ours=_ours, eager=_each(eager),
    shapes=SHAPES, small_shapes=SMALL_SHAPES, bound="flops", cost=_cost, compiles=False,
    launches=_launches, launch_shapes=SHAPES[:1],
    check_shape=lambda shape: (min(shape[0], 4096), min(shape[1], 32), min(shape[2], 2), shape[3]),
    peers=(
        Contestant(name="sdpa, document by document", call=_each(sdpa)),
        Contestant(name="flash-attn 2", call=_flash_attn, needs="flash_attn", cuda_only=True),
    ),
)  # fmt: skip
