"""The attention that transformers calls: a mask function and an attention function.

transformers first calls the mask function, once per forward and type of mask, and passes its result
to the attention function of each layer. The mask function here returns a KeyMask, which says which
keys exist, or None if every query sees all keys up to its own token. No (T, S) mask is built.

    no padding                 causal_attention; attention_decode for a few tokens with a cache
    packed position_ids        causal_attention_varlen over the documents
    padding, no cache          causal_attention_varlen over the tokens that are not padding
    padding, cache             attention_decode over keys sorted so that padding comes last
    padding, cache, gradient   causal_attention_varlen with queries for all keys

Outputs at padded tokens are zeros or depend on padding. No other token depends on them.

Shapes     query (B, H, T, K)   key, value (B, G, S, K)   output (B, T, H, K)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..attention.causal import causal_attention
from ..attention.decode import attention_decode
from ..attention.varlen import causal_attention_varlen

NAME = "tritium"
# attention_decode reads the keys once for 64 rows, which are tokens times query heads per key head.
# With 4 query heads per key head, as in Llama 3 8B, 16 tokens are 64 rows.
MAX_DECODE_TOKENS = 16
PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
# The functions of transformers.masking_utils that a mask may combine.
MASK_FUNCTIONS = {
    PACKED,
    "and_masks.<locals>.and_mask",
    "causal_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
}
# Arguments of attention functions that change the result, unless they are None, False or 0.
UNSUPPORTED = ("head_mask", "output_attentions", "s_aux", "position_bias", "softcap")


@dataclass(frozen=True, kw_only=True)
class KeyMask:
    """Which of the S keys exist. A query sees those of its document, up to its own token.

    Fields:
        keys: number of leading keys that have been written. None: all.
        lengths: (B,) number of keys that each sequence has, in compiled code with a cache. `keys`
            is then not known.
        cu_seqlens: (documents + 1,) int32, documents among the B T tokens in `order`.
        order: (B T,) indices that put padding after all other tokens. None: there is no padding.
        inverse: (B T,) indices that undo `order`.
        real: (B, keys) True for tokens that are not padding. None: there is no padding.
        new: (B, T) the part of `real` for the queries, if there are earlier keys.
        has_gaps: whether padding may lie between the tokens of a sequence.
    """

    keys: int | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    order: Tensor | None = None
    inverse: Tensor | None = None
    real: Tensor | None = None
    new: Tensor | None = None
    has_gaps: bool = False
    # generate() makes the masks of a static cache before it calls the model. The model then asks
    # for a mask again, unless the one that it gets has 2 axes.
    ndim: ClassVar[int] = 4

    def to(self, *args, **kwargs) -> "KeyMask":
        """Move the tensors, as accelerate does between the devices of a model."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **{name: x.to(*args, **kwargs) for name, x in tensors.items()})


# --- the mask function


def key_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | KeyMask | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **_,
) -> KeyMask | None:
    """Return which keys exist: the mask function for AttentionMaskInterface.

    Args:
        batch_size, kv_length: B and S.
        kv_offset: position of the first key.
        mask_function: of transformers.masking_utils.
        attention_mask: (B, tokens so far) bool, False for padding. A KeyMask is returned as it is.
        q_length, q_offset: T, and the position of the first query.
        cache_position: (T,) positions of the queries. Old versions pass it in place of q_offset.
        use_vmap: True for masks that the caller of transformers has written.
        device: of the queries, unless cache_position is given.
    Raises: NotImplementedError for a mask that is not causal, a sliding window or packed documents.
    """
    if isinstance(attention_mask, KeyMask):
        return attention_mask
    is_traced = torch.compiler.is_compiling()
    if cache_position is not None:
        q_length = cache_position.shape[0]
        q_offset = cache_position[0]
        device = cache_position.device
    if is_traced and not use_vmap:
        # torch.compile cannot look into the mask function. Without earlier keys it may be packed.
        is_packed = attention_mask is None and q_length == kv_length > 1
    else:
        is_packed = _check_mask_function(mask_function, use_vmap)
    if is_packed:
        cu_seqlens = _documents(mask_function, batch_size, kv_length, device, is_traced)
        return KeyMask(cu_seqlens=cu_seqlens)

    if isinstance(q_offset, Tensor) and not is_traced:
        q_offset = int(q_offset)
    end = q_offset + q_length - kv_offset
    if attention_mask is not None:
        return _padded(attention_mask, kv_offset, kv_length, q_length, end)
    if isinstance(end, Tensor):
        return KeyMask(lengths=end.expand(batch_size))
    return None if end == kv_length else KeyMask(keys=end)


def _check_mask_function(function: Callable, use_vmap: bool) -> bool:
    """Return whether the mask separates packed documents. Raise for an unknown mask."""
    names = set()
    remaining = [function]
    while remaining:
        part = remaining.pop()
        names.add(part.__qualname__)
        for cell in part.__closure__ or ():
            inner = cell.cell_contents
            remaining += inner if isinstance(inner, tuple) else [inner] if callable(inner) else []
    unknown = sorted(names - MASK_FUNCTIONS)
    if unknown or use_vmap or "causal_mask_function" not in names:
        raise NotImplementedError(
            "patch: attention must be causal, with an optional sliding window or packed "
            f"documents, got the mask function {', '.join(unknown) or sorted(names)}; "
            "call unpatch, or use another attn_implementation"
        )
    return PACKED in names


def _documents(
    mask_function: Callable, B: int, T: int, device: torch.device, is_traced: bool
) -> Tensor:
    """Return cu_seqlens. A token begins a document if it does not see the token before it."""
    row = torch.arange(B, device=device)[:, None]
    token = torch.arange(1, T, device=device)[None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    follows = mask_function(row, head, token, token - 1).expand(B, T - 1)
    starts = F.pad(~follows, (1, 0), value=True).flatten()
    # Mark the end of the last document too. torch.compile would fix B * T if it were the value.
    starts = F.pad(starts, (0, 1), value=True)
    if is_traced:
        # Compiled code needs a fixed number of documents: the last ones are empty.
        token = torch.arange(B * T + 1, device=device)
        boundaries = torch.where(starts, token, B * T).sort().values
    else:
        boundaries = starts.nonzero().flatten()
    return boundaries.to(torch.int32)


def _padded(
    attention_mask: Tensor, kv_offset: int, S: int, T: int, end: int | Tensor
) -> KeyMask | None:
    """Return the KeyMask of padded sequences, or None if the padding has no influence.

    Args:
        end: number of keys that have been written. A tensor in compiled code.
    """
    is_known = isinstance(end, int)
    keys = end if is_known else S
    missing = max(0, kv_offset + keys - attention_mask.shape[-1])
    real = F.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + keys]
    has_gaps = True
    if not torch.compiler.is_compiling():
        # One read from the device per forward. A rise is a token after padding.
        rises = (real[:, 1:] & ~real[:, :-1]).sum(1)
        is_tail = (rises == 0).all() & real[:, 0].all()
        has_gap = (rises + real[:, 0] > 1).any()
        all_real, is_tail, has_gaps = torch.stack((real.all(), is_tail, has_gap)).tolist()
        # Causal queries do not see padding that comes after them.
        if all_real or (is_tail and keys == T):
            return None if keys == S else KeyMask(keys=keys)
    mask = KeyMask(keys=keys, real=real, has_gaps=has_gaps)
    if keys == T:
        return replace(mask, **_compaction(real))
    if is_known:
        return replace(mask, new=real[:, keys - T :])
    columns = torch.arange(T, device=real.device) + end - T
    return replace(mask, new=real[:, columns], lengths=real.sum(1))


def _compaction(real: Tensor) -> dict[str, Tensor]:
    """Return the fields of KeyMask that gather the tokens in `real` (B, T)."""
    order = torch.argsort((~real).flatten().to(torch.uint8), stable=True)
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return {"order": order, "inverse": torch.argsort(order), "cu_seqlens": cu_seqlens}


# --- the attention function


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeyMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Return o (B, T, H, K) and None for the weights: the function for AttentionInterface.

    Args:
        module: the attention layer. `patch` has checked its attributes.
        attention_mask: the result of key_mask.
        dropout: probability of dropping an attention weight.
        scaling: multiplies the scores. Default: 1 / sqrt(K).
        sliding_window: how many keys a query sees, itself included.
        kwargs: cu_seq_lens_q is read. Arguments in UNSUPPORTED raise. Others are ignored.
    Raises: NotImplementedError for what the kernels do not compute.
    """
    _check(module, attention_mask, kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {"scale": scaling, "window": sliding_window}
    mask = KeyMask() if attention_mask is None else attention_mask
    documents = kwargs.get("cu_seq_lens_q")
    if documents is not None and attention_mask is None:
        mask = KeyMask(cu_seqlens=documents.to(torch.int32))
    if mask.keys is not None:
        k, v = k[:, : mask.keys], v[:, : mask.keys]
    T, S = q.shape[1], k.shape[1]
    if mask.has_gaps and sliding_window is not None and sliding_window < S:
        raise NotImplementedError(
            "patch: a sliding window needs sequences without padding between their tokens, got an "
            "attention_mask with such padding or a compiled forward; pad on the left"
        )

    # Choose the operator.
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    can_decode = not needs_grad and dropout == 0
    if mask.lengths is not None and not can_decode:
        raise NotImplementedError(
            "patch: attention to a cache in a compiled forward has no gradient and no dropout, "
            "got a forward in training; use torch.no_grad() and model.eval()"
        )
    if mask.cu_seqlens is not None:
        return _attend_documents(q, k, v, mask, dropout, options), None
    if mask.real is not None and can_decode:
        return _decode_padded(q, k, v, mask.real, mask.new, options), None
    if mask.lengths is not None:
        return attention_decode(q, k, v, mask.lengths, **options), None
    if mask.real is not None:
        mask = KeyMask(**_compaction(mask.real))
        q = F.pad(q, (0, 0, 0, 0, S - T, 0))
        return _attend_documents(q, k, v, mask, dropout, options)[:, S - T :], None
    if can_decode and T < S and T <= MAX_DECODE_TOKENS:
        lengths = torch.full((q.shape[0],), S, dtype=torch.int32, device=q.device)
        return attention_decode(q, k, v, lengths, **options), None
    return causal_attention(q, k, v, dropout_p=dropout, **options), None


def _check(module: nn.Module, mask: object, kwargs: dict) -> None:
    name = type(module).__name__
    if mask is not None and not isinstance(mask, KeyMask):
        raise NotImplementedError(
            f"patch: {name}: attention_mask must be (B, T), 1 for tokens and 0 for padding, got "
            f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}; "
            "call unpatch to use a mask of all queries and keys"
        )
    if getattr(module, "is_cross_attention", False) or not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"patch: {name}: attention must be causal self-attention, got cross or bidirectional "
            "attention; call unpatch"
        )
    for argument in UNSUPPORTED:
        if isinstance(kwargs.get(argument), Tensor) or kwargs.get(argument):
            raise NotImplementedError(
                f"patch: {name}: {argument} is not supported; call unpatch, or set "
                "attn_implementation='eager'"
            )


def _attend_documents(
    q: Tensor, k: Tensor, v: Tensor, mask: KeyMask, dropout: float, options: dict
) -> Tensor:
    """Attend within the documents of the B T tokens, without padding."""
    B, T = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if mask.order is not None:
        q, k, v = (x.index_select(0, mask.order) for x in (q, k, v))
    o = causal_attention_varlen(q, k, v, mask.cu_seqlens, B * T, dropout_p=dropout, **options)
    if mask.order is not None:
        o = o.index_select(0, mask.inverse)
    return o.unflatten(0, (B, T))


def _decode_padded(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, new: Tensor, options: dict
) -> Tensor:
    """Attend from T new tokens to a cache of S keys, without the keys of padding."""
    row = torch.arange(q.shape[0], device=q.device)[:, None]
    key_order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
    lengths = real.sum(1)
    k, v = k[row, key_order], v[row, key_order]
    if q.shape[1] == 1:
        return attention_decode(q, k, v, lengths, **options)
    # The last new token must be the last key. Padding among the new tokens therefore comes first.
    query_order = torch.argsort(new.to(torch.uint8), dim=1, stable=True)
    o = attention_decode(q[row, query_order], k, v, lengths, **options)
    return o[row, torch.argsort(query_order, dim=1)]


# Here, because a process that unpickles a patched model imports this file and not transformers.py.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, key_mask)
