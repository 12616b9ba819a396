"""Fused operators for training GPTs: Triton kernels on CUDA, PyTorch references on other devices.

Operators need torch and triton only. All but attention_decode are differentiable. They are
deterministic, pass opcheck, and compile with torch.compile(fullgraph=True).
"""

if "." not in __name__:
    # Python was started in the repository root, and a program imports `kernels`. transformers looks
    # for the PyPI package of that name; a module without a version is not installed for it. All
    # other imports get the error below, and no file of this folder is imported a second time.
    __path__ = []

    def __getattr__(name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(
            "this folder is part of the package 'tritium': "
            "write 'import tritium.kernels', not 'import kernels'",
            name=__name__,
        )

else:
    from .attention.causal import causal_attention, causal_attention_qkvpacked
    from .attention.decode import attention_decode
    from .attention.varlen import causal_attention_varlen
    from .embedding import embedding
    from .loss.cross_entropy import cross_entropy
    from .loss.linear_cross_entropy import linear_cross_entropy
    from .mlp.linear import linear
    from .mlp.mlp import gelu_mlp, relu2_mlp
    from .mlp.swiglu import swiglu
    from .mlp.swiglu_mlp import swiglu_mlp
    from .norm.layer_norm import add_layer_norm, layer_norm
    from .norm.rms_norm import add_rms_norm, rms_norm
    from .rotary import rotary

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_decode",
    "causal_attention",
    "causal_attention_qkvpacked",
    "causal_attention_varlen",
    "cross_entropy",
    "embedding",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "relu2_mlp",
    "rms_norm",
    "rotary",
    "swiglu",
    "swiglu_mlp",
]
