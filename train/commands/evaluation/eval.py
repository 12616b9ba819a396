"""tritium eval: perplexity, choices, tasks of lm-evaluation-harness, and BLEU."""

import importlib
from collections.abc import Sequence

from ....errors import InputError, unknown_name

_HELP = """usage: tritium eval perplexity|choice|lm-eval|bleu MODEL ...

  tritium eval perplexity MODEL TEXT ...       nats, perplexity, bits per byte of texts and shards
  tritium eval choice MODEL FILE               HellaSwag, LAMBADA, or choices of your own
  tritium eval lm-eval MODEL --tasks NAME ...  tasks of lm-evaluation-harness (extra `eval`)
  tritium eval bleu MODEL FILE                 generated texts against references (extra `eval`)

Each command has --help. MODEL is a run, a checkpoint, a Hugging Face folder or a GGUF file."""

# Command -> module of this folder. Its `main(argv)` runs the command and returns the exit status.
_COMMANDS = {
    "perplexity": "_perplexity",
    "choice": "_choice",
    "lm-eval": "_lm_eval",
    "bleu": "_bleu",
}


def main(argv: Sequence[str]) -> int:
    """Run `tritium eval`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    name, *words = argv
    if name not in _COMMANDS:
        raise InputError(unknown_name("eval command", name, _COMMANDS))
    return importlib.import_module(f".{_COMMANDS[name]}", __package__).main(words)
