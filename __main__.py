"""The `tritium` command."""

import sys
from collections.abc import Sequence

HELP = """tritium: train GPTs with Triton kernels

  tritium train [RECIPE] [--key value ...]    train; without a recipe, the best one for this machine
  tritium train --resume RUN_DIR              go on with a stopped run
  tritium data build OUT_DIR INPUT ...        text to token shards
  tritium sample RUN_DIR --prompt TEXT        write text with a trained model
  tritium plan RECIPE --gpu NAME              what a run needs: memory, time, cost
  tritium bench kernels|codegen|train|report  measure
  tritium info                                versions, device, ceilings, caches

Each command has --help."""


def dispatch(argv: Sequence[str]) -> int:
    """Run one command. Returns: exit status."""
    from . import __version__
    from .bench.commands import bench
    from .errors import InputError
    from .train.commands.cli import near
    from .train.commands.commands import COMMANDS

    commands = {**COMMANDS, "bench": bench}
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"tritium {__version__}")
        return 0
    if argv[0] not in commands:
        raise InputError(f"no command {argv[0]!r}; near: {near(argv[0], list(commands))}")
    return commands[argv[0]](argv[1:])


def main() -> None:
    """Run the command line and exit with its status."""
    from .train.commands.cli import run

    sys.exit(run(dispatch, sys.argv[1:]))


if __name__ == "__main__":
    main()
