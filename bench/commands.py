"""tritium bench: the measuring commands, each in its own module, imported when it is asked for."""

import importlib
from collections.abc import Sequence

from ..errors import InputError
from ..train.commands.cli import near

# Command -> module of this folder whose `main(argv)` runs it and returns the exit status.
COMMANDS = {
    "kernels": "ops.compare",
    "codegen": "codegen.table",
    "train": "training.training",
    "tune": "ops.tune",
    "traffic": "training.traffic",
    "report": "report",
}

HELP = """usage: tritium bench COMMAND [options]

  kernels [OP ...]     each operator beside eager PyTorch, torch.compile, SDPA and what else is installed
  codegen [OP ...]     the machine code of every kernel, for GPUs that need not be there
  tune OP              an operator's launch sizes against one another, on a GPU
  train                tokens a second beside a plain PyTorch GPT
  traffic              bytes of memory that a block moves per token, beside plain PyTorch and the least possible
  report               README's figures from bench/results

Each command has --help."""


def bench(argv: Sequence[str]) -> int:
    """tritium bench"""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] not in COMMANDS:
        raise InputError(
            f"tritium bench: no command {argv[0]!r}; near: {near(argv[0], list(COMMANDS))}"
        )
    return importlib.import_module(f".{COMMANDS[argv[0]]}", __package__).main(argv[1:])
