"""Attention on a packed qkv with QK-norm and RoPE, compared with separate operators."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ...kernels import causal_attention, causal_attention_qkvpacked, rms_norm, rotary
from ...kernels.attention.causal import cost
from .attention import eager, sdpa
from .case import Implementation, Operator, Randn
from .rotary import eager_rotary, tables

EPS = 1e-6
# B, T, H, K: heads of GPT-2 at 1,024 tokens, and head size 128.
SHAPES = ((32, 1024, 12, 64), (8, 4096, 16, 128))


def _inputs(randn: Randn, B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    return {"qkv": randn(B, T, 3 * H * K), "q_weight": randn(K), "k_weight": randn(K)}


def _ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    K = len(q_weight)
    cos, sin = tables(qkv.shape[1], K, qkv.device)
    return causal_attention_qkvpacked(
        qkv,
        qkv.shape[-1] // (3 * K),
        cos=cos,
        sin=sin,
        q_norm_weight=q_weight,
        k_norm_weight=k_weight,
        norm_eps=EPS,
    )


def _parts(qkv: Tensor, K: int) -> list[Tensor]:
    """Return q, k and v (B, T, H, K)."""
    return list(qkv.unflatten(-1, (3, -1, K)).unbind(2))


def _separate(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """Call this project's operators one by one."""
    q, k, v = _parts(qkv, len(q_weight))
    angles = tables(q.shape[1], q.shape[3], q.device)
    q, k = (rotary(rms_norm(x, w, eps=EPS), *angles) for x, w in ((q, q_weight), (k, k_weight)))
    return causal_attention(q, k, v).flatten(2)


def _in_torch(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        q, k, v = _parts(qkv, len(q_weight))
        q, k = (
            eager_rotary(F.rms_norm(x, w.shape, w, EPS)) for x, w in ((q, q_weight), (k, k_weight))
        )
        return attend(q, k, v).flatten(2)

    return call


def _cost(B: int, T: int, H: int, K: int, itemsize: int) -> dict[str, int]:
    """Add queries and keys: read and written, and in the backward also read by the norm."""
    found = cost(B, T, T, H, H, K, itemsize)
    qk_bytes = 2 * B * T * H * K * itemsize
    found["fwd_bytes"] += 2 * qk_bytes
    found["bwd_bytes"] += 3 * qk_bytes
    return found


ATTENTION_NORM_ROPE = Operator(
    name="causal_attention_qkvpacked:norm_rope",
    sizes=("B", "T", "H", "K"),
    inputs=_inputs,
    ours=_ours,
    eager=_in_torch(eager),
    cost=_cost,
    check_shape=lambda B, T, H, K: (1, T, min(H, 2), K),
    shapes=SHAPES,
    small_shapes=((2, 128, 4, 64),),
    tiny_shape=(1, 35, 1, 16),
    launch_shapes=SHAPES[:1],
    bound="flops",
    others=(
        Implementation(name="separate operators", call=_separate),
        Implementation(name="sdpa", call=_in_torch(sdpa)),
    ),
)
