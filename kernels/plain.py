"""The check that a fused forward makes before it reads the parameters of a layer directly.

A fused forward does not call its layers. It would therefore ignore an adapter in place of a layer,
hooks, parametrizations, the forward of a subclass, and the operations of a quantized weight.
"""

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(layer: nn.Module, cls: type) -> bool:
    """Whether a layer is exactly of this class, without hooks and with the forward of the class.

    A parametrized layer has another class, and other forms of weight_norm add a hook. Quantized
    weights are subclasses of Tensor that define their own matmul.
    """
    is_hooked = "forward" in vars(layer) or any(getattr(layer, name) for name in _HOOKS)
    if type(layer) is not cls or is_hooked:
        return False
    return all(type(each) in (Tensor, nn.Parameter) for each in layer.parameters(recurse=False))
