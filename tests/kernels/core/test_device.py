from types import SimpleNamespace

import pytest
import torch

from tritium.errors import InputError
from tritium.kernels.core import device as device_module
from tritium.kernels.core.device import DEFAULT_SM_COUNT, arch, sm_count

pytestmark = pytest.mark.plain


def test_sm_count_has_a_default_without_a_gpu():
    assert sm_count(torch.device("cpu")) == sm_count(torch.device("meta")) == DEFAULT_SM_COUNT


def test_arch_is_named_as_compilers_name_it(monkeypatch):
    assert arch(torch.device("cpu")) == arch(torch.device("meta")) == "sm_90"
    monkeypatch.setattr(device_module, "DEFAULT_ARCH", "sm_80")
    assert arch(torch.device("meta")) == "sm_80"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert arch(torch.device("cuda:6")) == "sm_100"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert arch(torch.device("cuda:7")) == "gfx942"


def test_gpus_older_than_sm_80_raise(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        InputError, match="expected a GPU of architecture sm_80 or newer, got sm_75"
    ):
        arch(torch.device("cuda:5"))
