"""`python -m tritium.train ...` is `tritium train ...`, for torchrun."""

import sys

from .run.signals import end_at_once_on_signals

if __name__ == "__main__":
    end_at_once_on_signals()
    from .commands import run_command
    from .commands.cli import run

    sys.exit(run(lambda argv: run_command("train", argv), sys.argv[1:]))
