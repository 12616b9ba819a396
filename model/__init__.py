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
    from .gpt import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig"]


def __getattr__(name: str):
    # The import of PyTorch takes seconds, and the shape of a model does not need it.
    if name == "GPT":
        return importlib.import_module(".gpt", __name__).GPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
