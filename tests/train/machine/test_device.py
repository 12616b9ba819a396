import pytest
import torch

from tritium.errors import InputError
from tritium.train.machine.device import _is_float32_accurate, choose_device, choose_matmul

pytestmark = pytest.mark.plain


def test_missing_devices_raise():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:99", "meta", ""):
        with pytest.raises(InputError, match="device: expected a device that PyTorch finds here"):
            choose_device(name)


def test_float32_matmuls_on_the_cpu_stay_accurate():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        choose_matmul(torch.device("cpu"))
        assert _is_float32_accurate()
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_the_accuracy_probe_detects_bfloat16(monkeypatch):
    multiply = torch.Tensor.__matmul__

    def rounded(a, b):
        return (
            multiply(a.bfloat16(), b.bfloat16()).float()
            if a.dtype == torch.float32
            else multiply(a, b)
        )

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not _is_float32_accurate()


def test_float32_matmuls_on_cuda_do_not_use_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        choose_matmul(torch.device("cuda"))
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_matmuls_of_16_bits_on_cuda_add_in_float32(dtype):
    name = f"allow_{dtype}_reduced_precision_reduction"
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    try:
        setattr(matmul, name, True)
        choose_matmul(torch.device("cuda"))
        assert not getattr(matmul, name)
    finally:
        setattr(matmul, name, before)
