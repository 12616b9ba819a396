"""The device of a run, and how PyTorch multiplies float32 matrices on it."""

import ctypes

import torch

from ...errors import InputError

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def choose_device(name: str) -> torch.device:
    """Return the device that the option names; auto: CUDA if there is a GPU, else the CPU.

    Raises: InputError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise InputError(
            f"device: expected a device that PyTorch finds here, got {name!r}; "
            "leave it out or say cpu"
        ) from None
    return device


def choose_matmul(device: torch.device) -> None:
    """Make PyTorch multiply float32 matrices on `device` in float32, as fast as it can.

    CUDA: TF32 is off. Matmuls are in float32 there only if the user asked for it with `precision`.
    Every GPU with TF32 also has bfloat16, for users who want speed. Matmuls of 16 bits that are
    split along their sum add the pieces in float32.

    CPU: on x86 processors not made by Intel, PyTorch's default library MKL runs slower code. The
    setting "bf16" moves float32 matmuls to oneDNN, which computes them in float32 unless the
    processor has bf16 matrix units (AMX). The setting is kept only if a matmul
    still has the accuracy of float32. AMD EPYC, 2 cores, 2024: 440 instead of 200 GFLOP/s.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if not _is_float32_accurate():
        torch.backends.mkldnn.matmul.fp32_precision = before


def keep_freed_memory() -> None:
    """Make glibc's allocator keep what PyTorch frees, for the rest of the process.

    By default the allocator requests memory from the system for each tensor above 128 KiB, and
    returns it when the tensor is freed. The system clears the pages of each request. On an AMD EPYC
    (2024) this took a third of the step time of a small model. Memory in use does not grow.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _is_float32_accurate() -> bool:
    """Return whether an n x n matmul is within the error bound of float32: n eps / 2 |a| @ |b|.

    Operands rounded to bfloat16 or TF32 make errors ten or more times as large.
    """
    n = 256
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator)
    b = torch.randn(n, n, generator=generator)
    error = (a @ b - a.double() @ b.double()).abs().max()
    largest = (a.double().abs() @ b.double().abs()).max()
    return bool(error <= n * torch.finfo(torch.float32).eps / 2 * largest)
