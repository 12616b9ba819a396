"""The operators behind the public functions of causal attention, and their gradients.

`attention` takes q, k and v as three tensors, `packed_attention` takes them in one. Both return o
and lse. Three implementations compute the same:

    CUDA                  the Triton kernels, launch.py
    CPU                   the definition, _reference.py
    CPU, plain attention  PyTorch's scaled_dot_product_attention (SDPA), which is faster than the
                          definition in 32 bits. It returns no lse: a caller that needs lse calls
                          `attention.dispatch`, which skips SDPA. In 16 bits the definition runs:
                          the backward of SDPA takes 7 times as long, and its dk and dv have twice
                          the error (bfloat16, 1 x 1024 x 12 x 64, one thread of an Intel Xeon,
                          PyTorch 2.13, November 2026).
"""

import torch
from torch import Tensor

from ..core.added_bias import attach
from ..core.layout import unit_stride
from ..core.op import define_op, is_32_bit
from ._reference import (
    reference_bwd,
    reference_fwd,
    reference_qkvpacked_bwd,
    reference_qkvpacked_fwd,
    shapes_bwd,
    shapes_fwd,
    shapes_qkvpacked_bwd,
    shapes_qkvpacked_fwd,
    split_qkv,
)
from ._sdpa import is_plain, sdpa
from .launch import launch_bwd, launch_fwd, launch_qkvpacked_bwd, launch_qkvpacked_fwd
from .options import AttentionOptions

# --- plain attention on a CPU


def _sdpa_applies(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> bool:
    return is_32_bit(q) and is_plain(q.shape[1], k.shape[1], options)


def _sdpa_applies_packed(
    qkv: Tensor,
    added_bias: Tensor | None,
    n_head: int,
    n_kv_head: int,
    options: AttentionOptions,
) -> bool:
    return is_32_bit(qkv) and is_plain(qkv.shape[1], qkv.shape[1], options)


def _sdpa_packed(
    qkv: Tensor,
    added_bias: Tensor | None,
    n_head: int,
    n_kv_head: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H K), and an empty tensor in place of lse."""
    qkv = attach(qkv, added_bias)
    o, lse = sdpa(*split_qkv(qkv, n_head, n_kv_head), options)
    return o.flatten(2), lse


# --- operators

# causal_attention and causal_attention_varlen call this operator.
PUBLIC_NAMES = "causal_attention or causal_attention_varlen"

attention = define_op(
    "causal_attention_fwd",
    launch=launch_fwd,
    reference=reference_fwd,
    shapes=shapes_fwd,
    composite=sdpa,
    composite_if=_sdpa_applies,
    public_name=PUBLIC_NAMES,
)
_attention_bwd = define_op(
    "causal_attention_bwd",
    launch=launch_bwd,
    reference=reference_bwd,
    shapes=shapes_bwd,
    public_name=PUBLIC_NAMES,
)
packed_attention = define_op(
    "causal_attention_qkvpacked_fwd",
    launch=launch_qkvpacked_fwd,
    reference=reference_qkvpacked_fwd,
    shapes=shapes_qkvpacked_fwd,
    composite=_sdpa_packed,
    composite_if=_sdpa_applies_packed,
)
_packed_attention_bwd = define_op(
    "causal_attention_qkvpacked_bwd",
    launch=launch_qkvpacked_bwd,
    reference=reference_qkvpacked_bwd,
    shapes=shapes_qkvpacked_bwd,
)

# --- gradients


def _save(ctx, inputs, output):
    q, k, v, options = inputs
    o, lse = output
    ctx.set_materialize_grads(False)
    ctx.options = options.with_tensors(None, None)
    ctx.save_for_backward(q, k, v, o, lse, options.seed, options.cu_seqlens)


def _grad(ctx, do, dlse):
    if do is None and dlse is None:
        return None, None, None, None
    q, k, v, o, lse, *tensors = ctx.saved_tensors
    do = torch.zeros_like(q) if do is None else unit_stride(do)
    dlse = None if dlse is None else dlse.contiguous()
    options = ctx.options.with_tensors(*tensors)
    dq, dk, dv = _attention_bwd(do, dlse, q, k, v, o, lse, options)
    return dq, dk, dv, None


def _save_packed(ctx, inputs, output):
    qkv, added_bias, n_head, n_kv_head, options = inputs
    o, lse = output
    ctx.set_materialize_grads(False)
    ctx.head_counts = n_head, n_kv_head
    ctx.bias_dtype = None if added_bias is None else added_bias.dtype
    ctx.options = options.with_tensors(None, None)
    ctx.save_for_backward(qkv, o, lse, options.seed, options.cu_seqlens)


def _grad_packed(ctx, do, _dlse):
    # The public function does not return lse, so lse has no gradient.
    if do is None:
        return None, None, None, None, None
    qkv, o, lse, *tensors = ctx.saved_tensors
    options = ctx.options.with_tensors(*tensors)
    needs_bias = ctx.needs_input_grad[1]
    dqkv, dbias = _packed_attention_bwd(
        do.contiguous(), qkv, o, lse, *ctx.head_counts, needs_bias, options
    )
    dbias = dbias.to(ctx.bias_dtype) if needs_bias else None
    return dqkv, dbias, None, None, None


attention.register_autograd(_grad, setup_context=_save)
packed_attention.register_autograd(_grad_packed, setup_context=_save_packed)
