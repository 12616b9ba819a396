"""GPT models: configurations are data, modules are thin layers over `tritium.kernels`."""

if "." not in __name__:
    raise ModuleNotFoundError(
        "this folder is part of the package 'tritium': "
        "write 'import tritium.model', not 'import model'",
        name=__name__,
    )

from .classifier import GPTClassifier
from .config import GPTConfig
from .gpt import GPT
from .presets import PRESETS

__all__ = ["GPT", "PRESETS", "GPTClassifier", "GPTConfig"]
