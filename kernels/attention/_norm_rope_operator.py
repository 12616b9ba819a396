"""Packed attention with QK-norm and RoPE: two operators and their gradient.

    qk_norm_rope                  qkv -> qk, the queries and keys after norm and RoPE
    causal_attention_norm_rope    qkv and qk -> o. Its backward also computes the backward of norm
                                  and RoPE, so qk needs no gradient

The forward is two operators, so that selective activation checkpointing keeps o and lse, and
computes qk again. The backward is one operator: attention writes the packed gradient of qkv, and
then one kernel changes the columns of queries and keys in place.

_operator.py says which implementation runs on which device.
"""

import torch
from torch import Tensor

from ..core.added_bias import attach
from ..core.op import define_op, is_32_bit, is_transformed, runs_reference
from ._inputs import check_document_values
from ._norm_rope import (
    NormRope,
    launch_norm_rope,
    launch_norm_rope_bwd,
    reference_norm_rope,
    reference_norm_rope_bwd,
)
from ._reference import (
    attend,
    shapes_qkvpacked_bwd,
    shapes_qkvpacked_fwd,
    split_qkv,
    wide_grads,
)
from ._sdpa import is_plain, sdpa
from .launch import launch_attend, launch_packed_grads
from .options import AttentionOptions

NAME = "causal_attention_qkvpacked"


def attend_norm_rope(
    qkv: Tensor,
    added_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    norm_rope: NormRope,
    options: AttentionOptions,
) -> Tensor:
    """Return o (B, T, H K)."""
    if _sdpa_applies(qkv, options):
        qkv = attach(qkv, added_bias)
        arguments = (qkv, q_weight, k_weight, n_head, n_kv_head, norm_rope)
        if torch.compiler.is_compiling():
            # The compiler differentiates and fuses the definition.
            heads = _split_heads(qkv, reference_norm_rope(*arguments), n_head, n_kv_head)
        else:
            heads = _ChangedHeads.apply(*arguments)
        o, _ = sdpa(*heads, options)
        return o.flatten(2)
    weights = (q_weight, k_weight)
    detached = (None if x is None else x.detach() for x in (qkv, *weights))
    qk = _norm_rope(*detached, n_head, n_kv_head, norm_rope)
    o, _ = _attention(qkv, qk, added_bias, *weights, n_head, n_kv_head, norm_rope, options)
    return o


# --- plain attention on a CPU


def _sdpa_applies(qkv: Tensor, options: AttentionOptions) -> bool:
    T = qkv.shape[1]
    if not (runs_reference(qkv) and is_32_bit(qkv) and is_plain(T, T, options)):
        return False
    # torch.func cannot transform _ChangedHeads.
    return torch.compiler.is_compiling() or not is_transformed()


class _ChangedHeads(torch.autograd.Function):
    """Return q and k after norm and RoPE, and v. The gradient of qkv is written once."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, n_head, n_kv_head, norm_rope):
        qk = reference_norm_rope(qkv, q_weight, k_weight, n_head, n_kv_head, norm_rope)
        ctx.eps = norm_rope.eps
        ctx.save_for_backward(qkv, q_weight, k_weight, norm_rope.cos, norm_rope.sin)
        return _split_heads(qkv, qk, n_head, n_kv_head)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        norm_rope = NormRope(eps=ctx.eps, cos=cos, sin=sin)
        dq, dk, dq_weight, dk_weight = reference_norm_rope_bwd(
            dq, dk, qkv, q_weight, k_weight, norm_rope
        )
        dweights = (None, None) if q_weight is None else (dq_weight, dk_weight)
        return torch.cat((dq, dk, dv), 2).flatten(2), *dweights, None, None, None


# --- references, and launchers of the same signatures


def _split_heads(
    qkv: Tensor, qk: Tensor, n_head: int, n_kv_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q (B, T, H, K) and k (B, T, G, K) in qk, and of v (B, T, G, K) in qkv."""
    q, k = qk.split_with_sizes((n_head, n_kv_head), dim=2)
    return q, k, split_qkv(qkv, n_head, n_kv_head)[2]


def reference_attention_fwd(
    qkv: Tensor,
    qk: Tensor,
    added_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    norm_rope: NormRope,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H K) and lse (B, H, T).

    Only v of qkv is read. The bias, the weights and norm_rope are arguments for the gradient.
    """
    check_document_values(NAME, options.cu_seqlens, qkv.shape[1])
    o, lse = attend(*_split_heads(qkv, qk, n_head, n_kv_head), options)
    return o.flatten(2), lse


def shapes_attention_fwd(
    qkv: Tensor,
    qk: Tensor,
    added_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    norm_rope: NormRope,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of `reference_attention_fwd`."""
    return shapes_qkvpacked_fwd(qkv, None, n_head, n_kv_head, options)


def launch_attention_fwd(
    qkv: Tensor,
    qk: Tensor,
    added_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    norm_rope: NormRope,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_attention_fwd`."""
    check_document_values(NAME, options.cu_seqlens, qkv.shape[1])
    o, lse = launch_attend(*_split_heads(qkv, qk, n_head, n_kv_head), options)
    B, T, H, K = o.shape
    return o.view(B, T, H * K), lse


def reference_attention_bwd(
    do: Tensor,
    qkv: Tensor,
    qk: Tensor,
    o: Tensor,
    lse: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    needs_bias: bool,
    norm_rope: NormRope,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, its bias, q_weight and k_weight. Unneeded ones are empty."""
    heads = _split_heads(qkv, qk, n_head, n_kv_head)
    do, o = (x.unflatten(-1, (n_head, -1)) for x in (do, o))
    dq, dk, dv = wide_grads(do, None, *heads, o, options)
    dq, dk, *dweights = reference_norm_rope_bwd(dq, dk, qkv, q_weight, k_weight, norm_rope)
    dqkv = torch.cat((dq, dk, dv), 2).flatten(2)
    dbias = dqkv.sum((0, 1)) if needs_bias else dqkv.new_empty(0)
    return dqkv.to(qkv.dtype).contiguous(), dbias, *dweights


def shapes_attention_bwd(
    do: Tensor,
    qkv: Tensor,
    qk: Tensor,
    o: Tensor,
    lse: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    needs_bias: bool,
    norm_rope: NormRope,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the outputs of `reference_attention_bwd`."""
    dqkv, dbias = shapes_qkvpacked_bwd(do, qkv, o, lse, n_head, n_kv_head, needs_bias, options)
    dweights = [
        lse.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        for weight in (q_weight, k_weight)
    ]
    return dqkv, dbias, *dweights


def launch_attention_bwd(
    do: Tensor,
    qkv: Tensor,
    qk: Tensor,
    o: Tensor,
    lse: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    needs_bias: bool,
    norm_rope: NormRope,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_attention_bwd`."""
    dqkv, dbias = shapes_qkvpacked_bwd(do, qkv, o, lse, n_head, n_kv_head, needs_bias, options)
    heads = _split_heads(qkv, qk, n_head, n_kv_head)
    written_bias = dbias if needs_bias else None
    launch_packed_grads(dqkv, written_bias, do, heads, o, lse, options)
    dweights = launch_norm_rope_bwd(
        dqkv, written_bias, qkv, q_weight, k_weight, n_head, n_kv_head, norm_rope
    )
    return dqkv, dbias, *dweights


# --- operators

_norm_rope = define_op(
    "qk_norm_rope", launch=launch_norm_rope, reference=reference_norm_rope, public_name=NAME
)
_attention = define_op(
    "causal_attention_norm_rope_fwd",
    launch=launch_attention_fwd,
    reference=reference_attention_fwd,
    shapes=shapes_attention_fwd,
    public_name=NAME,
)
_attention_bwd = define_op(
    "causal_attention_norm_rope_bwd",
    launch=launch_attention_bwd,
    reference=reference_attention_bwd,
    shapes=shapes_attention_bwd,
    public_name=NAME,
)

# --- gradients


def _save_nothing(ctx, inputs, output):
    pass


def _no_gradient(ctx, dqk):
    # attend_norm_rope passes detached inputs. torch.compile and torch.func need a gradient.
    return None, None, None, None, None, None


def _save(ctx, inputs, output):
    qkv, qk, added_bias, q_weight, k_weight, *counts, norm_rope, options = inputs
    o, lse = output
    ctx.set_materialize_grads(False)
    ctx.head_counts = counts
    ctx.bias_dtype = None if added_bias is None else added_bias.dtype
    ctx.eps = norm_rope.eps
    ctx.options = options.with_tensors(None, None)
    tables = (norm_rope.cos, norm_rope.sin)
    of_options = (options.seed, options.cu_seqlens)
    ctx.save_for_backward(qkv, qk, o, lse, q_weight, k_weight, *tables, *of_options)


def _grad(ctx, do, _dlse):
    # The public function does not return lse, so lse has no gradient.
    if do is None:
        return (None,) * 9
    *tensors, q_weight, k_weight, cos, sin, seed, cu_seqlens = ctx.saved_tensors
    norm_rope = NormRope(eps=ctx.eps, cos=cos, sin=sin)
    options = ctx.options.with_tensors(seed, cu_seqlens)
    needs_bias = ctx.needs_input_grad[2]
    arguments = (*ctx.head_counts, needs_bias, norm_rope, options)
    dqkv, dbias, *dweights = _attention_bwd(
        do.contiguous(), *tensors, q_weight, k_weight, *arguments
    )
    dbias = dbias.to(ctx.bias_dtype) if needs_bias else None
    dweights = (None, None) if q_weight is None else dweights
    return dqkv, None, dbias, *dweights, None, None, None, None


_norm_rope.register_autograd(_no_gradient, setup_context=_save_nothing)
_attention.register_autograd(_grad, setup_context=_save)
