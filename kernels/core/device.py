"""The architecture of a device, and its number of multiprocessors."""

import functools

import torch

from ...errors import InputError

# Without a GPU (interpreter, ahead-of-time compilation) launches are planned for an H100 or H200.
DEFAULT_SM_COUNT = 132
DEFAULT_ARCH = "sm_90"


@functools.cache
def sm_count(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU (compute units on AMD).

    Return DEFAULT_SM_COUNT for other devices.
    """
    if device.type != "cuda":
        return DEFAULT_SM_COUNT
    return torch.cuda.get_device_properties(device).multi_processor_count


def arch(device: torch.device) -> str:
    """Return the architecture of a GPU as compilers name it: "sm_90", "gfx942".

    Return DEFAULT_ARCH for other devices. Raise InputError for NVIDIA GPUs older than sm_80.
    """
    return _arch(device) if device.type == "cuda" else DEFAULT_ARCH


@functools.cache
def _arch(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise InputError(
            f"kernels: expected a GPU of architecture sm_80 or newer, got sm_{major}{minor}; "
            "use another GPU or the CPU"
        )
    return f"sm_{major}{minor}"
