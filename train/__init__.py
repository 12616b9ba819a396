"""Train GPTs on text: data, the training loop, run folders, recipes and commands.

The module can be called: tritium.train("laptop", steps=200) is api.train.
"""

import sys
from types import ModuleType

if "." not in __name__:
    raise ModuleNotFoundError(
        "this folder is part of the package 'tritium': "
        "write 'import tritium.train', not 'import train'",
        name=__name__,
    )


class _Callable(ModuleType):
    """This module. Calling it trains a model."""

    def __call__(self, *arguments, **options):
        from .api import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
