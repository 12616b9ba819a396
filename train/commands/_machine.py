"""The lines of `tritium info`: versions, the device and its limits, caches."""

import platform

import torch

from ... import __version__
from ...errors import plural
from ...kernels.core.device import sm_count
from ...kernels.core.op import INTERPRET
from ...kernels.core.triton import HAS_TRITON, triton
from ..machine.device import choose_device
from ..machine.gpus import ceiling
from ..recipes import default_recipe
from ..storage.cache import cache_dir


def describe_machine() -> dict[str, str]:
    """Return the lines of `tritium info` by their names."""
    return {**_versions(), **_describe_device(choose_device("auto")), **_caches()}


def _versions() -> dict[str, str]:
    installed = "not installed"
    if HAS_TRITON:
        installed = triton.__version__ + (", interpreter on" if INTERPRET else "")
    return {
        "tritium": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed,
    }


def _describe_device(device: torch.device) -> dict[str, str]:
    limits = "not known for this device: no MFU is reported"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        cores = f"{sm_count(device)} SMs"
        known = ceiling(name)
        if known is not None:
            limits = (
                f"{known.bf16_flops / 1e12:.0f} TFLOP/s dense bf16, "
                f"{known.bytes_per_second / 1e12:.2f} TB/s memory"
            )
    else:
        name = f"{platform.machine()} CPU"
        cores = plural(torch.get_num_threads(), "thread")
    uses_triton = device.type == "cuda" and HAS_TRITON
    return {
        "device": name,
        "cores": cores,
        "kernels": "Triton" if uses_triton else "PyTorch references",
        "ceilings": limits,
        "default recipe": default_recipe(),
    }


def _caches() -> dict[str, str]:
    # Imported here because it takes two seconds.
    from torch._inductor.runtime import cache_dir_utils

    compiled = cache_dir_utils.cache_dir()
    kernels = "none"
    if HAS_TRITON:
        kernels = f"{triton.knobs.cache.dir}; set TRITON_CACHE_DIR to move it"
    return {
        "caches": f"{cache_dir()} (datasets); set TRITIUM_HOME to move it",
        "compile cache": f"{compiled} (torch.compile); set TORCHINDUCTOR_CACHE_DIR to move it",
        "kernel cache": kernels,
    }
