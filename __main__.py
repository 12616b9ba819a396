"""The `tritium` command."""

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from .train.cli import run
    from .train.commands import dispatch

    sys.exit(run(dispatch, sys.argv[1:]))


if __name__ == "__main__":
    main()
