"""Causal attention: every query attends to its own token and the tokens before it.

    forward    s = scale q k^T                scores, one per (query, key) pair
               t = c tanh(s / c)              soft-capping, if c > 0; otherwise t = s
               t = -inf                       for keys that the query does not see
               p = exp(t - lse)               weights, where lse = log sum_j exp(t): softmax
               o = (p * z) v                  z = kept / (1 - dropout_p), kept is 0 or 1; without
                                              dropout z = 1
    backward   dv = (p * z)^T do
               dp = (do v^T) * z
               dt = p * (dp - delta)          delta = sum(do * o) - dlse, one number per query
               ds = dt * (1 - (t / c)^2)      the slope of soft-capping; ds = dt without it
               dq = scale ds k                dk = scale ds^T q
    mask       query i sees key j if 0 <= (i + S - T) - j < window, and both are in one document.
               With more keys than queries (S > T) the last query is the same token as the last key.

`dt` follows from p = exp(t - lse): dt_j = p_j dp_j - p_j sum_k(p_k dp_k), where the second term is
the gradient through lse. The sum equals sum(do * o), one number per query, so the backward needs
neither p nor dp of other tiles.

Shapes     q, o: (B, T, H, K)   k, v: (B, S, G, K)   lse: (B, H, T) float32, natural logarithm
           G divides H: H / G query heads share a key head.   S >= T
Precision  any float dtype in and out; scores, softmax and sums in float32. p and ds are rounded to
           the dtype of the inputs before they enter a matmul. In the backward the relative error
           of p is about 2^-24 |score| for float32 inputs, because lse is rounded to float32: 6 % at
           a score of 10^6, and far more at larger ones.
Dropout    random bits depend only on the seed and on (b, h, i, j), so the backward and activation
           checkpointing get the mask of the forward. Word j % 4 of Philox counter
           ((b H + h) T + i) ceil(S / 4) + j / 4. j is counted from the document's first key.
Cost       matmuls: 2 forward, 7 backward, of 2 B H K FLOPs per visible (query, key) pair. The
           formulas need 2 and 5, and cost() counts these.
Determinism  two passes: one backward kernel owns queries and writes dq (3 matmuls), the other owns
           keys and writes dk and dv (4 matmuls). Both compute s, p and dp, so 2 matmuls and the
           exponentials are done twice. There are no atomics.
           One pass: a kernel owns a head and computes all gradients with 5 matmuls. It adds to dq
           in memory, in a fixed order. It is fast only with as many heads as the GPU has
           multiprocessors, or more, and is not the default yet. See BACKWARD in launch.py.
Files      _reference.py: definition; _sdpa.py: plain attention on a CPU; _kernels.py, _one_pass.py
           and _tiles.py: kernels; _documents.py: packed documents; launch.py: launchers;
           _tile_choice.py: tile sizes; options.py: options; _inputs.py: checks; _operator.py:
           operators and gradients; _norm_rope.py, _norm_rope_kernels.py, _norm_rope_operator.py:
           QK-norm and RoPE of a packed qkv
Bias       `added_bias` is a bias that qkv already contains. Its value is not read. The backward
           returns its gradient, the sum of qkv's gradient over tokens, and does not read that
           gradient from memory again. Detach the bias where it is added, so that it gets its
           gradient only once:
               qkv = linear(x, weight, bias.detach())
               o = causal_attention_qkvpacked(qkv, n_head, added_bias=bias)
Source     Vaswani et al. 2017, arXiv:1706.03762; Dao 2023 (FlashAttention-2), arXiv:2307.08691
"""

from torch import Tensor

from ..core.layout import unit_stride
from ..core.matmul import autocast
from ..core.op import public
from ._inputs import check_heads, check_packed
from ._norm_rope import NormRope, check_norm_rope
from ._norm_rope_operator import attend_norm_rope
from ._operator import attention, packed_attention
from .options import AttentionOptions, resolve_options


def cost(
    B: int, T: int, S: int, H: int, G: int, K: int, itemsize: int, *, window: int | None = None
) -> dict[str, int]:
    """FLOPs of the matmuls over visible pairs, and least bytes to move, forward and backward."""
    window = S if window is None else window
    pairs = sum(min(window, i + S - T + 1) for i in range(T))
    q_bytes = B * T * H * K * itemsize
    kv_bytes = 2 * B * S * G * K * itemsize
    lse_bytes = 4 * B * H * T
    return {
        "fwd_flops": 2 * 2 * B * H * K * pairs,
        "bwd_flops": 5 * 2 * B * H * K * pairs,
        "fwd_bytes": 2 * q_bytes + kv_bytes + lse_bytes,
        "bwd_bytes": 4 * q_bytes + 2 * kv_bytes + lse_bytes,
    }


@public
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each query to its own token and the tokens before it.

    Args:
        q: (B, T, H, K), float32, bfloat16 or float16, on a CPU also float64. K <= 256. Any strides:
            read in place if the last one is 1, copied otherwise.
        k, v: (B, S, G, K), dtype and device of q. G divides H. S >= T: the last query is the same
            token as the last key.
        scale: multiplies the scores before the softmax, positive. Default: 1 / sqrt(K).
        window: how many keys a query sees, itself included. Default: all.
        softcap: c > 0 replaces a score s by c tanh(s / c). 0 or None: scores stay as they are.
        dropout_p: probability of dropping an attention weight, in [0, 1). Default: 0.
        seed: seed of the dropout mask, an int or a () int64 tensor on the device of q. Default:
            drawn from PyTorch's generator of that device.
        return_lse: also return the log-sum-exp of the scores. Gradients flow through it.
    Returns: o (B, T, H, K), dtype of q; or (o, lse) with lse (B, H, T), natural logarithm, float32
        (float64 if q is).
    Raises: ValueError for a shape, dtype, device or option that does not fit. TypeError for float64
        on a GPU.
    """
    name = "causal_attention"
    q, k, v = autocast(q, k, v)
    check_heads(name, q, k, v, axes=4, shapes="q must be (B, T, H, K), k and v (B, S, G, K)")
    (B, T, _, K), S = q.shape, k.shape[1]
    if k.shape[0] != B:
        raise ValueError(f"{name}: k and v must have q's batch size {B}, got {tuple(k.shape)}")
    if S < T:
        raise ValueError(
            f"{name}: there must be at least as many keys as the {T} queries, got {S}; "
            "the last query and the last key are the same token"
        )
    options = resolve_options(name, K, S, q.device, scale, window, softcap, dropout_p, seed)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if return_lse:
        return attention.dispatch(q, k, v, options)
    return attention(q, k, v, options)[0]


@public
def causal_attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    *,
    n_kv_head: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    added_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Attend as causal_attention does, with q, k and v read where a linear layer wrote them.

    Args:
        qkv: (B, T, (H + 2 G) K), dtypes of causal_attention: H query heads, then G key heads, then
            G value heads.
        n_head: H.
        n_kv_head: G, a divisor of H. Default: H.
        scale, window, softcap, dropout_p, seed: as for causal_attention.
        cu_seqlens: as for causal_attention_varlen, for documents packed in the B T tokens.
            Default: B sequences.
        added_bias: ((H + 2 G) K,), any float dtype: a bias that qkv already contains. It gets its
            gradient here, see the top of this file. Default: no bias gets a gradient here.
        cos, sin: (S, K / 2) with S >= T, or (B, T, K / 2), as for `rotary`: rotate queries and
            keys. The tables get no gradient. Default: no RoPE.
        q_norm_weight, k_norm_weight: (K,), any float dtype: first normalize each query and each
            key head as rms_norm does. Default: no norm.
        norm_eps: added to the mean square of a head.
    Returns: o (B, T, H K), dtype of qkv. The gradient of qkv is packed too.
    Raises: ValueError for a shape, dtype, device or option that does not fit. TypeError for float64
        on a GPU.
    """
    name = "causal_attention_qkvpacked"
    (qkv,) = autocast(qkv)
    H, G = n_head, n_head if n_kv_head is None else n_kv_head
    K = check_packed(name, qkv, H, G, added_bias, cu_seqlens)
    norm_rope = check_norm_rope(name, qkv, K, cos, sin, q_norm_weight, k_norm_weight, norm_eps)
    keys = qkv.shape[1] * (1 if cu_seqlens is None else qkv.shape[0])
    options = resolve_options(
        name, K, keys, qkv.device, scale, window, softcap, dropout_p, seed, cu_seqlens
    )
    weights = (q_norm_weight, k_norm_weight)
    return _attend_packed(qkv, added_bias, *weights, H, G, norm_rope, options)


def _attend_packed(
    qkv: Tensor,
    added_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    norm_rope: NormRope,
    options: AttentionOptions,
) -> Tensor:
    """Return o (B, T, H K) of arguments that are checked."""
    B, T, width = qkv.shape
    if options.cu_seqlens is not None:
        # The operators take documents as one sequence.
        qkv = qkv.reshape(1, B * T, width)
        norm_rope = norm_rope.of_one_sequence(B, T)
    qkv = unit_stride(qkv)
    if norm_rope.cos is None and q_weight is None:
        o, _ = packed_attention(qkv, added_bias, n_head, n_kv_head, options)
    else:
        if q_weight is not None:
            q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
        weights = (q_weight, k_weight)
        o = attend_norm_rope(qkv, added_bias, *weights, n_head, n_kv_head, norm_rope, options)
    return o if options.cu_seqlens is None else o.view(B, T, o.shape[-1])
