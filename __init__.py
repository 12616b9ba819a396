"""tritium: a GPT trainer built around Triton kernels.

Each layer imports only the layers above it in this list:

    tritium.kernels    fused operators; they need torch and triton only
    tritium.model      GPTs as data and thin modules
    tritium.train      data, training loop, checkpoints, commands
    tritium.bench      measurements

From Python:

    tritium.train("laptop", data="my.txt", steps=200)       train a model, as `tritium train` does
    tritium.finetune("instruct", run, "records.jsonl")      train it further
    tritium.load("runs/laptop-1")                           open a run

train/api.py describes them. They import PyTorch when they are first used.
"""

import importlib
import os
import sys

__version__ = "0.1.0"

# Public name -> the module that has it. `train` is a module that can be called.
_PUBLIC = {
    **dict.fromkeys(("finetune", "load", "Run"), "train.api"),
    **dict.fromkeys(("InputError", "DivergedError", "InterruptedRun", "NoMemoryError"), "errors"),
}
__all__ = ["train", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name == "train":
        return importlib.import_module(".train", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
