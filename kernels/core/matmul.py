"""Matrix multiplication around the kernels: the dtype under autocast, and accumulation into float32."""

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast the operands of a matmul as torch.autocast does: floats to the autocast dtype, except float64.

    Without an active autocast the tensors come back unchanged.
    """
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not (
        torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    ):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
        else tensor.to(dtype)
        for tensor in tensors
    )


def matmul_out(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Write a @ b to `out`, or add it there.

    16-bit operands and a float32 `out`: the sum is never rounded to 16 bits.
    """
    beta = int(accumulate)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.device.type in ("cuda", "meta") and not torch.version.hip:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        # Only cuBLAS multiplies 16 bits into 32.
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
