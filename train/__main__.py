"""`python -m tritium.train ...`: the same as `tritium train ...`, for torchrun."""

import sys

from .cli import run
from .commands import train

if __name__ == "__main__":
    sys.exit(run(train, sys.argv[1:]))
