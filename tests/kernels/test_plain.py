"""is_plain tells whether a fused forward may read the parameters of a layer directly."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tritium.kernels.plain import is_plain

pytestmark = pytest.mark.plain


class Subclass(nn.Linear):
    pass


def with_own_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


def with_hook(method: str):
    def change(layer: nn.Module) -> nn.Module:
        getattr(layer, method)(lambda *_: None)
        return layer

    return change


class Quantized(torch.Tensor):
    """A weight with its own operations."""


def with_quantized_weight(layer: nn.Module) -> nn.Module:
    weight = layer.weight.detach().as_subclass(Quantized)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


CHANGES = {
    "adapter": lambda layer: nn.Sequential(layer),
    "subclass": lambda layer: Subclass(4, 3),
    "own forward": with_own_forward,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrization": lambda layer: parametrize.register_parametrization(
        layer, "weight", nn.Identity()
    ),
    "quantized weight": with_quantized_weight,
    "forward hook": with_hook("register_forward_hook"),
    "forward pre-hook": with_hook("register_forward_pre_hook"),
    "backward hook": with_hook("register_full_backward_hook"),
    "backward pre-hook": with_hook("register_full_backward_pre_hook"),
}


def test_a_new_layer_is_plain():
    layer = nn.Linear(4, 3)
    assert is_plain(layer, nn.Linear)
    assert not is_plain(layer, nn.Bilinear)
    handle = layer.register_forward_hook(lambda *_: None)
    handle.remove()
    assert is_plain(layer, nn.Linear)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_is_not_plain(name):
    assert not is_plain(CHANGES[name](nn.Linear(4, 3)), nn.Linear)
