"""The commands of `tritium`. Each is a file of this folder, imported when the command runs."""

import importlib
from collections.abc import Sequence

# Command -> module of this folder. Its `main(argv)` runs the command and returns the exit status.
COMMANDS = {
    "train": "train",
    "data": "data",
    "sample": "sample",
    "chat": "chat",
    "export": "export",
    "import": "import_model",
    "plan": "plan",
    "info": "info",
}


def run_command(name: str, argv: Sequence[str]) -> int:
    """Import and run the command `name`. Returns: the exit status."""
    return importlib.import_module(f".{COMMANDS[name]}", __package__).main(argv)
