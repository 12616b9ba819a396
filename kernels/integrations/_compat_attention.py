"""Attention under the signatures of PyTorch's SDPA and of flash-attn 2; see compat.py."""

import torch
from torch import Tensor

from ..attention.causal import causal_attention, causal_attention_qkvpacked
from ..attention.decode import attention_decode
from ..attention.varlen import causal_attention_varlen
from ..core.op import can_read_values, public
from ..rotary import rotary

NO_WINDOW = (-1, -1)


def check_default(name: str, **options: tuple[object, object]) -> None:
    """Raise a ValueError for the first option whose value is not its default.

    Args:
        name: the imitated function.
        options: name of each option that is not supported -> (its value, its default).
    """
    for option, (value, default) in options.items():
        is_default = value is None if default is None else value == default
        if isinstance(value, Tensor) or not is_default:
            found = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name}: {option} is not supported, expected {default}, got {found}")


def _window(
    name: str, causal: bool, window_size: tuple[int, int], *, is_one_query: bool
) -> int | None:
    """Check that attention is causal. Convert a window of flash-attn, or return None for none.

    flash-attn counts the keys before the query. causal_attention counts the query's own key too.
    """
    if not _is_window(window_size):
        raise ValueError(
            f"{name}: window_size must hold two sizes, or -1 for no bound, got {window_size!r}"
        )
    left, right = window_size
    # A single query sees all keys with and without a causal mask. flash-attn's right bound 0 is a
    # causal mask.
    if not causal and not is_one_query and right != 0:
        raise ValueError(
            f"{name}: causal must be True, or window_size[1] 0, got {causal} and {window_size}; "
            "these kernels are causal"
        )
    return None if left == -1 else left + 1


def _is_window(window_size: object) -> bool:
    return (
        isinstance(window_size, (tuple, list))
        and len(window_size) == 2
        and all(isinstance(size, (int, torch.SymInt)) and size >= -1 for size in window_size)
    )


def _check_heads(name: str, **tensors: Tensor) -> None:
    """Raise a ValueError unless all tensors have the four axes (B, T, H, K)."""
    for argument, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(f"{name}: {argument} must be (B, T, H, K), got {tuple(x.shape)}")


def _results(name: str, o: Tensor, lse: Tensor, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of return_attn_probs. Without dropout the third is empty."""
    if dropout_p > 0:
        raise ValueError(
            f"{name}: return_attn_probs needs dropout_p 0, got {dropout_p}; "
            "the dropout mask is not stored"
        )
    return o, lse, o.new_empty(0)


@public
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replace torch.nn.functional.scaled_dot_product_attention where attention is causal.

    Args:
        query: (B, H, T, K).
        key, value: (B, G, S, K). With is_causal S must equal T, because PyTorch aligns the mask at
            the first key and these kernels at the last key.
        is_causal: must be True, except for a single query, which sees all keys.
        enable_gqa: must be True if G is not H.
        dropout_p, scale: as in PyTorch. Dropout draws other random numbers.
        attn_mask: must be None.
    Returns: (B, H, T, K).
    Raises: ValueError for an option that is not supported.
    """
    name = "scaled_dot_product_attention"
    check_default(name, attn_mask=(attn_mask, None))
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"{name}: query, key and value must be (B, H, T, K), got {shapes}")
    (H, T), (G, S) = query.shape[1:3], key.shape[1:3]
    if not is_causal and T != 1:
        raise ValueError(f"{name}: is_causal must be True, got False; these kernels are causal")
    if is_causal and T != S:
        raise ValueError(
            f"{name}: is_causal needs as many keys as queries, got {S} and {T}; PyTorch aligns the "
            "mask at the first key, causal_attention at the last"
        )
    if H != G and not enable_gqa:
        raise ValueError(f"{name}: enable_gqa must be True for {H} query and {G} key heads")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return causal_attention(q, k, v, scale=scale, dropout_p=dropout_p).transpose(1, 2)


@public
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Replace flash_attn.flash_attn_func where attention is causal.

    Args:
        q: (B, T, H, K).
        k, v: (B, S, G, K) with S >= T. flash-attn also takes S < T.
        causal: must be True, except for a single query or window_size[1] = 0.
        window_size: how many keys before and after its own key a query sees; -1: all.
        alibi_slopes: must be None.
        deterministic: both values give deterministic results.
        return_attn_probs: also return lse (B, H, T), and an empty tensor in place of the
            probabilities, which flash-attn returns for its own tests. dropout_p must then be 0.
    Returns: o (B, T, H, K), or three tensors with return_attn_probs.
    Raises: ValueError for an option that is not supported.
    """
    name = "flash_attn_func"
    check_default(name, alibi_slopes=(alibi_slopes, None))
    _check_heads(name, q=q, k=k, v=v)
    window = _window(name, causal, window_size, is_one_query=q.shape[1] == 1)
    options = {"scale": softmax_scale, "window": window, "softcap": softcap, "dropout_p": dropout_p}
    if not return_attn_probs:
        return causal_attention(q, k, v, **options)
    o, lse = causal_attention(q, k, v, **options, return_lse=True)
    return _results(name, o, lse, dropout_p)


@public
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Replace flash_attn.flash_attn_qkvpacked_func where attention is causal.

    Args:
        qkv: (B, T, 3, H, K): q, k and v of each token.
        other arguments: as for flash_attn_func.
    Returns: o (B, T, H, K), or three tensors with return_attn_probs.
    Raises: ValueError for an option that is not supported.
    """
    name = "flash_attn_qkvpacked_func"
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{name}: qkv must be (B, T, 3, H, K), got {tuple(qkv.shape)}")
    check_default(name, alibi_slopes=(alibi_slopes, None))
    window = _window(name, causal, window_size, is_one_query=qkv.shape[1] == 1)
    options = {"scale": softmax_scale, "window": window, "softcap": softcap, "dropout_p": dropout_p}
    if return_attn_probs:
        o, lse = causal_attention(*qkv.unbind(2), **options, return_lse=True)
        return _results(name, o, lse, dropout_p)
    H, K = qkv.shape[3:]
    return causal_attention_qkvpacked(qkv.flatten(2), H, **options).unflatten(2, (H, K))


@public
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Replace flash_attn.flash_attn_varlen_func where attention is causal.

    Args:
        q: (N, H, K), documents packed end to end.
        k, v: (N, G, K).
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32, the same lengths. On a GPU they must
            be the same tensor: comparing their values would wait for the device. The same holds in
            a traced or compiled graph.
        block_table: must be None.
        causal: must be True, except for window_size[1] = 0.
        other arguments: as for flash_attn_func.
    Returns: o (N, H, K), or three tensors with return_attn_probs, lse as (H, N).
    Raises: ValueError for an option that is not supported.
    """
    name = "flash_attn_varlen_func"
    check_default(name, alibi_slopes=(alibi_slopes, None), block_table=(block_table, None))
    # The lengths of the documents are not known here. A document may have several queries.
    window = _window(name, causal, window_size, is_one_query=False)
    if not _are_equal(cu_seqlens_q, cu_seqlens_k):
        raise ValueError(
            f"{name}: cu_seqlens_k must equal cu_seqlens_q, because each query needs a key of its "
            "own; pass the same tensor for both on a GPU and in a traced or compiled graph"
        )
    o, lse = causal_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        max(max_seqlen_q, max_seqlen_k),
        scale=softmax_scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        return_lse=True,
    )
    return _results(name, o, lse, dropout_p) if return_attn_probs else o


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal values, as far as this is known without a synchronization."""
    if a is b:
        return True
    if a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(a, b) if can_read_values(a) else False


@public
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Replace flash_attn.flash_attn_with_kvcache where attention is causal.

    Args:
        q: (B, T, H, K).
        k_cache, v_cache: (B, S, G, K).
        k, v: (B, T', G, K), written to the caches after the first cache_seqlens tokens, or None.
        rotary_cos, rotary_sin: (positions, R / 2), to rotate q and k, or None. They need k and v.
        cache_seqlens: tokens in the caches without k, an int or (B,) int32 or int64. None: S.
        causal, window_size, softcap, softmax_scale: as for flash_attn_func.
        other arguments: must have their defaults.
    Returns: o (B, T, H, K), without a gradient.
    Raises: ValueError for an unsupported option; on a CPU also if k does not fit in the cache.
    """
    name = "flash_attn_with_kvcache"
    check_default(
        name,
        cache_batch_idx=(cache_batch_idx, None),
        cache_leftpad=(cache_leftpad, None),
        block_table=(block_table, None),
        alibi_slopes=(alibi_slopes, None),
        num_splits=(num_splits, 0),
        return_softmax_lse=(return_softmax_lse, False),
    )
    _check_heads(name, q=q, k_cache=k_cache, v_cache=v_cache)
    window = _window(name, causal, window_size, is_one_query=q.shape[1] == 1)
    _check_new_tokens(name, k, v, rotary_cos, rotary_sin, cache_seqlens)
    lengths = _lengths(name, k_cache, cache_seqlens)
    if k is not None:
        _check_append(name, k_cache, v_cache, k, v, lengths)
        if rotary_cos is not None:
            new = max(q.shape[1], k.shape[1])
            _check_room(name, "rotary_cos's", len(rotary_cos), lengths, new)
            q, k = (_rotate(x, rotary_cos, rotary_sin, lengths, rotary_interleaved) for x in (q, k))
        _append(k_cache, k, lengths)
        _append(v_cache, v, lengths)
        lengths = lengths + k.shape[1]
    return attention_decode(
        q, k_cache, v_cache, lengths, scale=softmax_scale, window=window, softcap=softcap
    )


def _check_new_tokens(
    name: str,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
) -> None:
    """Raise a ValueError if an argument is missing that another one needs."""
    if (k is None) != (v is None) or (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{name}: k needs v, and rotary_cos needs rotary_sin")
    if k is None and rotary_cos is not None:
        raise ValueError(f"{name}: rotary_cos needs k and v, got None")
    if k is not None and cache_seqlens is None:
        raise ValueError(f"{name}: k and v need cache_seqlens, got None")


def _lengths(name: str, k_cache: Tensor, cache_seqlens: int | Tensor | None) -> Tensor:
    """Return cache_seqlens as a tensor (B,)."""
    B, S = k_cache.shape[:2]
    lengths = S if cache_seqlens is None else cache_seqlens
    if isinstance(lengths, (int, torch.SymInt)):
        return torch.full((B,), lengths, dtype=torch.int32, device=k_cache.device)
    is_tensor = isinstance(lengths, Tensor)
    if not is_tensor or lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
        found = f"{lengths.dtype} {tuple(lengths.shape)}" if is_tensor else repr(lengths)
        raise ValueError(
            f"{name}: cache_seqlens must be an int, or int32 or int64 ({B},), got {found}"
        )
    return lengths


def _check_append(
    name: str, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> None:
    """Raise a ValueError unless new tokens fit the caches. Indexing would broadcast them."""
    B, _, G, K = k_cache.shape
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{name}: v_cache must be {tuple(k_cache.shape)} like k_cache, "
            f"got {tuple(v_cache.shape)}"
        )
    if k.ndim != 4 or v.shape != k.shape or k.shape != (B, k.shape[1], G, K):
        raise ValueError(
            f"{name}: k and v must be ({B}, T, {G}, {K}) like the caches, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    _check_room(name, "the cache's", k_cache.shape[1], lengths, k.shape[1])


def _check_room(name: str, what: str, size: int, lengths: Tensor, new: int) -> None:
    """Raise a ValueError if `new` tokens after `lengths` do not fit, where values can be read."""
    if not can_read_values(lengths) or torch.compiler.is_compiling():
        return
    if ((lengths < 0) | (lengths + new > size)).any():
        tokens = "1 new token fits" if new == 1 else f"{new} new tokens fit"
        raise ValueError(
            f"{name}: cache_seqlens must be from 0 to {size - new}, so that {tokens} into {what} "
            f"{size} positions, got {lengths.tolist()}"
        )


def _positions(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the position of each token of x (B, T, ...), which follow `lengths` (B,) tokens."""
    return lengths.long()[:, None] + torch.arange(x.shape[1], device=x.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, interleaved: bool) -> Tensor:
    positions = _positions(x, lengths)
    return rotary(x, cos[positions], sin[positions], interleaved=interleaved)


def _append(cache: Tensor, new: Tensor, lengths: Tensor) -> None:
    """Write `new` (B, T, G, K) into the cache, after the first `lengths` (B,) tokens."""
    batch = torch.arange(len(new), device=new.device)[:, None]
    cache[batch, _positions(new, lengths)] = new.detach().to(cache.dtype)
