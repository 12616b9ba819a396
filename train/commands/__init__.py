"""The commands of `tritium`. Each is a file, which is imported when the command runs."""

import importlib
from collections.abc import Sequence

from ..run.signals import restore_default_signals
from ..terminal.console import lossy_output
from .cli import paused_collector

# Command -> module of this folder. Its `main(argv)` runs the command and returns the exit status.
COMMANDS = {
    "train": "training.train",
    "finetune": "training.finetune",
    "data": "data",
    "runs": "runs",
    "plot": "plot",
    "sample": "models.sample",
    "chat": "models.chat",
    "classify": "models.classify",
    "export": "models.export",
    "import": "models.import_model",
    "plan": "training.plan",
    "eval": "evaluation.eval",
    "info": "info",
}


def run_command(name: str, argv: Sequence[str]) -> int:
    """Import and run the command `name`. Returns: the exit status."""
    with paused_collector():
        module = importlib.import_module(f".{COMMANDS[name]}", __package__)
    # They handle signals themselves, and continue if nobody reads their output.
    if name in ("train", "finetune"):
        with lossy_output():
            return module.main(argv)
    restore_default_signals()
    return module.main(argv)
