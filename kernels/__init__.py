"""Fused operators for training GPTs: Triton kernels on CUDA, their PyTorch references everywhere else.

Needs torch and triton only. Every operator is differentiable, deterministic, opcheck-clean and made for torch.compile.
"""

if "." not in __name__:
    raise ImportError("this folder is part of the package 'tritium': write 'import tritium.kernels', not 'import kernels'")

from .attention import causal_attention
from .layer_norm import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "causal_attention", "layer_norm"]
