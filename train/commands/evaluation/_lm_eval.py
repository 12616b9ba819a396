"""tritium eval lm-eval: the tasks of lm-evaluation-harness."""

import importlib.util
import sys
from collections.abc import Sequence

from ....errors import InputError

_HELP = """usage: tritium eval lm-eval MODEL --tasks NAME [NAME ...] [options of lm_eval]

Run tasks of lm-evaluation-harness. All options are those of `lm_eval run`, such as --tasks,
--num_fewshot, --limit, --batch_size, --device, --include_path and --output_path. Options of the
model are `--model_args precision=... tokenizer=...`.

  tritium eval lm-eval MODEL --tasks lambada_openai       a model that tritium opens
  tritium eval lm-eval ls tasks                           other commands of lm_eval
  tritium eval lm-eval --model hf --model_args ...        another model, to compare"""

# How lm_eval's messages about unknown and missing tasks begin.
_TASK_ERRORS = ("Tasks not found", "No tasks specified")


def main(argv: Sequence[str]) -> int:
    """Run `tritium eval lm-eval`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "eval lm-eval: expected an installed lm_eval, found none; pip install 'tritium[eval]'"
        )
    from lm_eval.__main__ import cli_evaluate

    from ...eval import harness  # noqa: F401 - registers the model

    before = sys.argv
    sys.argv = ["lm_eval", *_words(argv)]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith(_TASK_ERRORS):
            raise
        raise InputError(
            f"eval lm-eval: expected --tasks with names of tasks that lm_eval has, got: {error}; "
            "`tritium eval lm-eval ls tasks` lists them"
        ) from None
    finally:
        sys.argv = before
    return 0


def _words(argv: Sequence[str]) -> list[str]:
    """Return the words of lm_eval's command line."""
    if argv[0].startswith("-") or argv[0] in ("run", "ls", "validate"):
        return list(argv)
    model, *words = argv
    arguments = [f"pretrained={model}"]
    if "--model_args" in words:
        place = words.index("--model_args")
        end = place + 1
        while end < len(words) and not words[end].startswith("-"):
            arguments.append(words[end])
            end += 1
        del words[place:end]
    return ["run", "--model", "tritium", "--model_args", ",".join(arguments), *words]
