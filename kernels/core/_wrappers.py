"""Wrappers around the implementations of operators, applied by define_op."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .triton import HAS_TRITON


def without_autocast(function: Callable) -> Callable:
    """Disable autocast inside: references and launchers choose their own precision."""

    @functools.wraps(function)
    def run(*args):
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args)

    return run


def without_float64(name: str, launch: Callable) -> Callable:
    """Raise for float64: kernels compute in float32, so the result would be less accurate."""

    @functools.wraps(launch)
    def run(*args):
        for arg in args:
            if isinstance(arg, Tensor) and arg.dtype == torch.float64:
                raise TypeError(
                    f"{name}: the kernel takes float32, bfloat16 or float16, got float64; "
                    "move the tensors to the CPU"
                )
        return launch(*args)

    return run


def on_device_of_tensors(launch: Callable) -> Callable:
    """Make the GPU of the tensors the current one, because Triton launches on the current GPU."""

    @functools.wraps(launch)
    def run(*args):
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run


def with_one_warning(name: str, reference: Callable) -> Callable:
    """Warn at the first call that the reference runs on CUDA."""

    @functools.cache
    def warn():
        why = "has no Triton kernel yet" if HAS_TRITON else "needs Triton, which is not installed"
        warnings.warn(f"tritium: {name} {why}; CUDA runs its PyTorch reference", stacklevel=4)

    @functools.wraps(reference)
    def run(*args):
        warn()
        return reference(*args)

    return run
