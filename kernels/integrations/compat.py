"""The operators under the names and signatures of other libraries. None of them is needed.

Replace an import to try these kernels:

    from tritium.kernels.integrations.compat import flash_attn_func    # was: from flash_attn

Each function converts arguments and results, and calls one operator of tritium.kernels. An option
that is not supported raises a ValueError with its name. docs/coming-from.md lists the differences.
"""

from ._compat_attention import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
)
from ._compat_liger import (
    CrossEntropyOutput,
    LigerCrossEntropyLoss,
    LigerFusedLinearCrossEntropyLoss,
    LigerLayerNorm,
    LigerRMSNorm,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerLayerNorm",
    "LigerRMSNorm",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
]
