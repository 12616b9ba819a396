import pytest

from tritium.train.machine.gpus import CEILINGS, ceiling

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
def test_ceiling_knows_devices_by_their_driver_names(name, key):
    assert ceiling(name) is CEILINGS[key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce GT 710",
        "NVIDIA H200 NVL",
        "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 MIG 1g.10gb",
    ],
)
def test_unknown_devices_and_variants_have_no_ceiling(name):
    assert ceiling(name) is None


def test_ceilings_are_plausible():
    for name, row in CEILINGS.items():
        assert 50e12 < row.bf16_flops < 5e15, name
        assert 0.5e12 < row.bytes_per_second < 10e12, name
        assert 20e9 < row.memory_bytes < 300e9, name
        assert 60e9 < row.link_bytes_per_second < 2e12, name


def test_each_row_is_found_by_its_own_driver_name():
    assert all(ceiling(row.driver_name) is row for row in CEILINGS.values())
