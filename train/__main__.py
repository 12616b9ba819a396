"""`python -m tritium.train ...` is `tritium train ...`, for torchrun."""

import sys

from .commands.cli import run
from .commands.train import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
