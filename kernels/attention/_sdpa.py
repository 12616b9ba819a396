"""Plain attention on a CPU by PyTorch's scaled_dot_product_attention (SDPA)."""

from torch import Tensor
from torch.nn import functional as F

from .options import AttentionOptions


def is_plain(T: int, S: int, options: AttentionOptions) -> bool:
    """Whether SDPA applies: as many queries as keys, no documents, no option except `scale`."""
    has_options = options.softcap > 0 or options.dropout_p > 0
    return options.cu_seqlens is None and T == S <= options.window and not has_options


def sdpa(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Return o, and an empty tensor in place of lse."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, K)
    o = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=options.scale, enable_gqa=True
    )
    return o.transpose(1, 2).contiguous(), o.new_empty(0)
