"""tritium: a GPT trainer built around Triton kernels.

Each layer imports only the layers above it in this list:

    tritium.kernels    fused operators; they need torch and triton only
    tritium.model      GPTs as data and thin modules
    tritium.train      data, training loop, checkpoints, commands
    tritium.bench      measurements
"""

import os
import sys

__version__ = "0.1.0"


def _is_this_folder(path: str) -> bool:
    try:
        return os.path.samefile(path or os.curdir, __path__[0])
    except OSError:  # the folder does not exist
        return False


def _leave_sys_path() -> None:
    """Take this folder off sys.path, where Python puts the folder that it is started in.

    The folder `kernels` would hide the PyPI package of that name, which transformers looks for.
    """
    sys.path[:] = [path for path in sys.path if not _is_this_folder(path)]


_leave_sys_path()
