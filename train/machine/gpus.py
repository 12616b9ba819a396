"""Limits of known GPUs, from the vendors' data sheets.

bf16_flops             dense peak without sparsity, at boost clock
bytes_per_second       memory bandwidth, reads plus writes
memory_bytes           decimal gigabytes; drivers report up to a few percent more
link_bytes_per_second  link to the other GPUs of a node (NVLink, Infinity Fabric or PCIe), both
                       directions together; NVLink bridges between two cards do not count
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Limits of one device.

    `driver_name` is the part of torch.cuda.get_device_name, in lower case, that identifies it.
    """

    driver_name: str
    generation: str
    bf16_flops: float
    bytes_per_second: float
    memory_bytes: float
    link_bytes_per_second: float


def _row(
    driver_name: str,
    generation: str,
    teraflops: float,
    terabytes_per_second: float,
    gigabytes: int,
    link_gb: int,
) -> Ceiling:
    return Ceiling(
        driver_name=driver_name,
        generation=generation,
        bf16_flops=teraflops * 1e12,
        bytes_per_second=terabytes_per_second * 1e12,
        memory_bytes=gigabytes * 1e9,
        link_bytes_per_second=link_gb * 1e9,
    )


# Keyed by the name that people type. The first row that matches wins, so "h100 pcie" must come
# before "h100".
CEILINGS = {
    "b200": _row("b200", "blackwell", 2250, 8.0, 180, 1800),
    "gh200": _row("gh200", "hopper", 989.4, 4.0, 96, 900),
    "h200": _row("h200", "hopper", 989.4, 4.8, 141, 900),
    "h100-nvl": _row("h100 nvl", "hopper", 835.5, 3.9, 94, 128),
    "h100-pcie": _row("h100 pcie", "hopper", 756, 2.0, 80, 128),
    "h100": _row("h100", "hopper", 989.4, 3.35, 80, 900),
    "a100-80gb": _row("a100-sxm4-80gb", "ampere", 312, 2.039, 80, 600),
    "a100-80gb-pcie": _row("a100 80gb pcie", "ampere", 312, 1.935, 80, 64),
    "a100-40gb": _row("a100-sxm4-40gb", "ampere", 312, 1.555, 40, 600),
    "l40s": _row("l40s", "ada", 362, 0.864, 48, 64),
    "rtx-5090": _row("rtx 5090", "blackwell", 209.5, 1.792, 32, 128),
    "rtx-4090": _row("rtx 4090", "ada", 165.2, 1.008, 24, 64),
    "rtx-3090": _row("rtx 3090", "ampere", 71, 0.936, 24, 64),
    "mi300x": _row("mi300x", "cdna3", 1307, 5.3, 192, 896),
}

# Words that mark a device with other limits: "H200 NVL", "RTX 4090 Laptop GPU", a MIG slice.
_VARIANTS = re.compile(r"\b(nvl|pcie|laptop|max-q|ti|super|d|mig)\b")


def ceiling(device_name: str) -> Ceiling | None:
    """Return the limits of a device, or None if the table does not know it.

    Args:
        device_name: as torch.cuda.get_device_name returns it.
    """
    name = device_name.lower()
    for row in CEILINGS.values():
        if re.search(rf"\b{row.driver_name}\b", name):
            break
    else:
        return None
    # A variant that the row does not name has other limits. No limits are better than wrong ones.
    unknown_variants = set(_VARIANTS.findall(name)) - set(_VARIANTS.findall(row.driver_name))
    return None if unknown_variants else row
