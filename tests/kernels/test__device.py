import pytest
import torch

from tritium.kernels._device import CEILINGS, DEFAULT_SM_COUNT, ceiling, sm_count

pytestmark = pytest.mark.plain


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_devices_are_known_by_the_names_drivers_give(name, key):
    assert ceiling(name) is CEILINGS[key]


def test_unknown_devices_have_no_ceiling():
    assert ceiling("NVIDIA GeForce GT 710") is None


def test_ceilings_are_plausible():
    for name, row in CEILINGS.items():
        assert 50e12 < row.bf16_flops < 5e15, name
        assert 0.5e12 < row.bytes_per_second < 10e12, name
        assert 20e9 < row.memory_bytes < 300e9, name
        assert 60e9 < row.link_bytes_per_second < 2e12, name


def test_no_driver_name_hides_a_row_below_it():
    assert all(ceiling(row.driver_name) is row for row in CEILINGS.values())


def test_a_device_that_is_no_gpu_is_planned_for_as_one():
    assert sm_count(torch.device("cpu")) == sm_count(torch.device("meta")) == DEFAULT_SM_COUNT
