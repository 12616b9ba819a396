"""The device a run uses and how float32 is multiplied there: the one place that decides."""

import ctypes

import torch

from ..errors import InputError

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def choose_device(name: str) -> torch.device:
    """Turn the option into a device that exists. Raises: InputError if it does not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise InputError(
            f"device: expected a device that PyTorch finds here, got {name!r}; leave it out or say cpu"
        ) from None
    return device


def choose_matmul(device: torch.device) -> None:
    """Set how PyTorch multiplies float32 matrices on `device`: always in float32.

    CUDA: no TF32. Products are float32 there only if `precision` asked for it, and every GPU with TF32 has bfloat16 too.
    CPU: where PyTorch's default library is MKL, x86 processors not made by Intel get its slower code; the setting "bf16" hands
    float32 products to oneDNN instead, which keeps them in float32 unless the processor has bf16 matrix units (AMX). So it is
    kept only if a product still comes out as accurate as float32: on an AMD EPYC of 2024 that is so, and products run at 440
    instead of 200 GFLOP/s on two cores.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if not _is_float32_accurate():
        torch.backends.mkldnn.matmul.fp32_precision = before


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what PyTorch frees for its next tensors, for the rest of the process.

    By default each tensor above 128 KiB is a new mapping, zeroed page by page and given back: on an AMD EPYC of 2024 that took
    a third of a small model's step. Memory in use does not grow; what is free stays with the process.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _is_float32_accurate(n: int = 256) -> bool:
    """Whether a product of n-long rows is off by no more than n float32 roundings of its terms' magnitude explain.

    bfloat16 or TF32 factors make errors ten or more times as large.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator) for _ in range(2))
    error = (a @ b - a.double() @ b.double()).abs().max()
    return bool(
        error
        <= n * torch.finfo(torch.float32).eps / 2 * (a.double().abs() @ b.double().abs()).max()
    )
