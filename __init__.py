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


def _leave_sys_path() -> None:
    """Take this folder off sys.path, where Python puts the folder that it is started in.

    The folder `kernels` would hide the PyPI package of that name, which transformers looks for.
    """
    root = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or os.curdir) != root]


_leave_sys_path()
