"""Causal attention over documents of different lengths, packed end to end without padding.

causal.py gives formulas, precision and cost. Documents do not attend to each other. cu_seqlens, the
cumulative lengths, says where each document begins: document d has the tokens
[cu_seqlens[d], cu_seqlens[d + 1]).

A program of a kernel owns a tile of one document. The lengths are known on the device only, so a
small kernel (_causal_attention_schedule_kernel in _tiles.py) first lists the tiles of all
documents. Tiles with the most work come first. The host never waits for the device.
"""

from torch import Tensor

from ..core.layout import unit_stride
from ..core.matmul import autocast
from ..core.op import public
from ._inputs import check_documents, check_heads
from ._operator import attention
from .options import resolve_options


@public
def causal_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each of the documents that are packed end to end.

    Args:
        q: (N, H, K), dtypes of causal_attention. All N rows of q, k, v and of o's gradient must be
            finite, and so must the dots of these rows. This includes padding: tiles read past the
            end of a document and multiply the values there by 0.
        k, v: (N, G, K), dtype and device of q. G divides H.
        cu_seqlens: (documents + 1,) int32 on the device of q, cumulative lengths: 0 first, at most
            N last. Documents may be empty. Tokens after the last document are padding: their o,
            lse and gradients are zero. The values are checked on a CPU only, because on a GPU the
            check would wait for the device.
        max_seqlen: length of the longest document, or more. Results do not depend on it.
        scale, window, softcap, dropout_p, seed, return_lse: as for causal_attention.
    Returns: o (N, H, K), dtype of q; or (o, lse) with lse (H, N) as for causal_attention.
    Raises: ValueError for a shape, dtype, device or option that does not fit. TypeError for float64
        on a GPU.
    """
    name = "causal_attention_varlen"
    q, k, v = autocast(q, k, v)
    check_heads(name, q, k, v, axes=3, shapes="q must be (N, H, K), k and v (N, G, K)")
    N, _, K = q.shape
    if k.shape[0] != N:
        raise ValueError(f"{name}: there must be as many keys as the {N} queries, got {len(k)}")
    check_documents(name, cu_seqlens, q.device)
    if max_seqlen < 1:
        raise ValueError(
            f"{name}: max_seqlen must be at least 1, the longest document's length or more, "
            f"got {max_seqlen}"
        )
    options = resolve_options(
        name, K, N, q.device, scale, window, softcap, dropout_p, seed, cu_seqlens
    )
    # The operator takes one sequence of N tokens: a batch of 1.
    q, k, v = (unit_stride(x).unsqueeze(0) for x in (q, k, v))
    o, lse = attention(q, k, v, options)
    return (o[0], lse[0]) if return_lse else o[0]
