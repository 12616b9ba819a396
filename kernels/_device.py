"""What is known of each GPU: one table, keyed by the device's name, and the few questions the launchers ask.

Dense peaks without sparsity, at boost clock, as the vendors' data sheets state them; bandwidth of the memory, reads plus
writes. An unknown device is answered with None, so that a caller reports throughput and no share of a peak.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Peaks of one device: bf16 tensor FLOP/s and memory bytes/s."""

    bf16_flops: float
    bytes_per_second: float


# Matched in order as a substring of the device's name, lower case: longer names first.
CEILINGS = {
    "b200": Ceiling(bf16_flops=2250e12, bytes_per_second=8.0e12),
    "gh200": Ceiling(bf16_flops=989.4e12, bytes_per_second=4.0e12),
    "h200": Ceiling(bf16_flops=989.4e12, bytes_per_second=4.8e12),
    "h100 nvl": Ceiling(bf16_flops=835.5e12, bytes_per_second=3.9e12),
    "h100 pcie": Ceiling(bf16_flops=756e12, bytes_per_second=2.0e12),
    "h100": Ceiling(bf16_flops=989.4e12, bytes_per_second=3.35e12),
    "a100-sxm4-80gb": Ceiling(bf16_flops=312e12, bytes_per_second=2.039e12),
    "a100 80gb pcie": Ceiling(bf16_flops=312e12, bytes_per_second=1.935e12),
    "a100": Ceiling(bf16_flops=312e12, bytes_per_second=1.555e12),
    "l40s": Ceiling(bf16_flops=362e12, bytes_per_second=0.864e12),
    "rtx 5090": Ceiling(bf16_flops=209.5e12, bytes_per_second=1.792e12),
    "rtx 4090": Ceiling(bf16_flops=165.2e12, bytes_per_second=1.008e12),
    "rtx 3090": Ceiling(bf16_flops=71e12, bytes_per_second=0.936e12),
    "mi300x": Ceiling(bf16_flops=1307e12, bytes_per_second=5.3e12),
}

# A launch planned where no GPU is (interpreter, ahead-of-time compilation) is planned as for an H100 or H200.
DEFAULT_SM_COUNT = 132


def ceiling(device_name: str) -> Ceiling | None:
    """Peaks of a device by name (as torch.cuda.get_device_name gives it), or None if the table does not know it."""
    name = device_name.lower()
    return next((row for key, row in CEILINGS.items() if key in name), None)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on AMD) of a device; DEFAULT_SM_COUNT for devices that are no GPU."""
    if device.type != "cuda":
        return DEFAULT_SM_COUNT
    return torch.cuda.get_device_properties(device).multi_processor_count
