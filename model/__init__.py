"""GPT models: configurations are data, modules are thin layers over `tritium.kernels`."""

import importlib
from typing import TYPE_CHECKING

if "." not in __name__:
    raise ModuleNotFoundError(
        "this folder is part of the package 'tritium': "
        "write 'import tritium.model', not 'import model'",
        name=__name__,
    )

from .config import GPTConfig
from .presets import PRESETS

if TYPE_CHECKING:
    from .classifier import GPTClassifier
    from .gpt import GPT

__all__ = ["GPT", "PRESETS", "GPTClassifier", "GPTConfig"]
# Class -> its module, which is imported at the first use: the import of PyTorch takes seconds, and
# the shape of a model does not need it.
_MODULES = {"GPT": "gpt", "GPTClassifier": "classifier"}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
