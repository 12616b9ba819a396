import pytest
import torch

from tritium.errors import InputError
from tritium.train.device import _is_float32_accurate, choose_device, choose_matmul

pytestmark = pytest.mark.plain


def test_devices_that_are_not_there_are_refused():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:99", "meta", ""):
        with pytest.raises(InputError, match="device: expected a device that PyTorch finds here"):
            choose_device(name)


def test_products_on_the_cpu_stay_float32_accurate():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        choose_matmul(torch.device("cpu"))
        assert _is_float32_accurate()
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_the_probe_finds_bfloat16(monkeypatch):
    multiply = torch.Tensor.__matmul__

    def rounded(a, b):
        return (
            multiply(a.bfloat16(), b.bfloat16()).float()
            if a.dtype == torch.float32
            else multiply(a, b)
        )

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not _is_float32_accurate()


def test_products_of_float32_are_float32_on_cuda_too():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        choose_matmul(torch.device("cuda"))
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
