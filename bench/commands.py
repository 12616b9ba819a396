"""tritium bench: the measuring commands. A command is imported when it runs."""

import importlib
from collections.abc import Sequence

from ..errors import InputError, unknown_name

# Command -> module of this folder with `main(argv)`, which returns the exit status.
COMMANDS = {
    "machine": "machine",
    "kernels": "ops.compare",
    "codegen": "codegen.table",
    "train": "training.training",
    "overhead": "training.overhead",
    "sweep": "training.sweep",
    "host": "host_cost",
    "tune": "ops.tune",
    "predict": "training.predict",
    "traffic": "training.traffic",
    "errors": "pages.errors",
    "pages": "pages.pages",
    "pictures": "pages.pictures",
    "report": "report",
}

HELP = """usage: tritium bench COMMAND [options]

  machine [RECIPE]     limits of this machine, and whether a training step is repeatable
  kernels [OP ...]     compare operators with eager PyTorch, torch.compile, SDPA and libraries
  codegen [OP ...]     compile every kernel and read its machine code; no GPU is needed
  train [RECIPE]       compare training speed with a plain PyTorch GPT
  overhead [RECIPE]    measure what checkpoints and the check for bad steps cost, on a CPU
  sweep ROWS.json      train variations of a recipe, each for the same processor time
  host [OP ...]        measure the host's time per call of each operator, on a CPU
  tune OP              compare launch sizes of an operator on a GPU
  predict [RECIPE]     estimate a training step, kernel by kernel; no GPU is needed
  traffic              count the bytes that a block moves per token; no GPU is needed
  errors               measure errors of operators against float64, in three dtypes
  pages                write the generated parts of docs from the code and bench/results
  pictures             draw the pictures of docs/images from the code and bench/results
  report               write bench/results/REPORT.md from the JSON files next to it

Each command has --help."""


def bench(argv: Sequence[str]) -> int:
    """Run `tritium bench`. Returns: exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] not in COMMANDS:
        raise InputError(unknown_name("command", argv[0], COMMANDS))
    return importlib.import_module(f".{COMMANDS[argv[0]]}", __package__).main(argv[1:])
