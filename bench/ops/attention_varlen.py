"""Causal attention over packed documents of very different lengths.

Compared with a loop over the documents and with the flash-attention library.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import causal_attention_varlen
from ...kernels.attention.causal import cost
from .attention import eager, sdpa
from .case import Implementation, Operator, Randn

# N, documents, H, K: a batch of GPT-2's as short texts, and a long context with few documents.
SHAPES = ((32768, 256, 12, 64), (32768, 16, 16, 128))


@functools.cache
def lengths(N: int, documents: int) -> tuple[int, ...]:
    """Return the lengths of the documents, the same at each call.

    They are exponentially distributed, so that a few documents hold most of the N tokens.
    """
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(documents, generator=generator, dtype=torch.float64, device="cpu")
    cuts = uniform.log().neg().cumsum(0)
    ends = (cuts / cuts[-1] * N).round().long()
    return tuple(ends.diff(prepend=ends.new_zeros(1)).tolist())


def _inputs(randn: Randn, N: int, documents: int, H: int, K: int) -> dict[str, Tensor]:
    ends = torch.tensor([0, *lengths(N, documents)]).cumsum(0)
    q, k, v = (randn(N, H, K) for _ in range(3))
    return {"q": q, "k": k, "v": v, "cu_seqlens": ends.to(torch.int32)}


def _ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return causal_attention_varlen(q, k, v, cu_seqlens, len(q))


def _per_document(dense: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        sizes = lengths(len(q), len(cu_seqlens) - 1)
        documents = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        return torch.cat([dense(*(x[None] for x in document))[0] for document in documents])

    return call


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(lengths(len(q), len(cu_seqlens) - 1))
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)


def _cost(N: int, documents: int, H: int, K: int, itemsize: int) -> dict[str, int]:
    costs = [cost(1, T, T, H, H, K, itemsize) for T in lengths(N, documents)]
    return {name: sum(one[name] for one in costs) for name in costs[0]}


ATTENTION_VARLEN = Operator(
    name="causal_attention_varlen",
    sizes=("N", "documents", "H", "K"),
    inputs=_inputs,
    ours=_ours,
    eager=_per_document(eager),
    cost=_cost,
    check_shape=lambda N, documents, H, K: (min(N, 4096), min(documents, 32), min(H, 2), K),
    shapes=SHAPES,
    small_shapes=((512, 7, 2, 64),),
    tiny_shape=(70, 3, 1, 32),
    launch_shapes=SHAPES[:1],
    bound="flops",
    others=(
        Implementation(name="sdpa, document by document", call=_per_document(sdpa)),
        Implementation(name="flash-attn 2", call=_flash_attn, needs="flash_attn", cuda_only=True),
    ),
    compiles=False,
)
