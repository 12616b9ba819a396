"""Matmuls around the kernels: checks, operand dtypes under autocast, and sums in float32."""

import torch
from torch import Tensor

# Device types with an autocast. torch.compile cannot trace the question, so it is asked here.
_AUTOCAST_DEVICES = [
    name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)
]


def check_x(name: str, x: Tensor) -> None:
    """Raise a ValueError unless x is floating point (..., D); `name` is the operator."""
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"{name}: x must be floating point (..., D) with D at least 1, "
            f"got {x.dtype} {tuple(x.shape)}"
        )


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast operands of a matmul as torch.autocast does: all floats but float64 to its dtype.

    Without an active autocast the tensors come back unchanged. At least one is not None.
    """
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) if _is_cast(tensor) else tensor for tensor in tensors)


def _is_cast(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64


def matmul_out(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Write a @ b to `out`.

    If a and b have 16 bits and `out` has 32, the result is not rounded to 16 bits.

    Args:
        a: (M, K).
        b: (K, N), dtype of a.
        out: (M, N), dtype of a or float32.
        accumulate: add a @ b to `out` instead.
    """
    # beta = 0 makes addmm ignore what `out` holds, even NaN.
    beta = int(accumulate)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.device.type in ("cuda", "meta") and not torch.version.hip:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        # Only cuBLAS multiplies 16-bit operands into a 32-bit result.
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
