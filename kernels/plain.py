"""The check that a fused forward makes before it reads the parameters of a layer directly.

A fused forward does not call its layers. It would therefore ignore an adapter in place of a layer,
hooks, parametrizations, and the forward of a subclass.
"""

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(layer: nn.Module, cls: type) -> bool:
    """Whether a layer is exactly of this class, without hooks and with the forward of the class.

    A parametrized layer has another class, and other forms of weight_norm add a hook.
    """
    is_hooked = "forward" in vars(layer) or any(getattr(layer, name) for name in _HOOKS)
    return type(layer) is cls and not is_hooked
