"""`python -m tritium.train ...`: the same as `tritium train ...`, for torchrun."""

import sys

from .commands.cli import run
from .commands.commands import train

if __name__ == "__main__":
    sys.exit(run(train, sys.argv[1:]))
