"""The `tritium` command."""

import sys
from collections.abc import Sequence

HELP = """tritium: train GPTs with Triton kernels

  tritium train [RECIPE] [--key value ...]    train; without a recipe, the best one for this machine
  tritium train --resume RUN_DIR              continue a stopped run
  tritium finetune TASK MODEL --data FILE     fine-tune: instructions, labels, preferences
  tritium data build OUT_DIR INPUT ...        turn text into token shards
  tritium data verify DATASET                 check token shards against their checksums
  tritium eval perplexity|choice|... MODEL    perplexity, multiple choice, lm-eval, BLEU
  tritium runs [FOLDER]                       list runs: size, tokens, loss, speed, status
  tritium plot RUN ...                        plot loss, learning rate and speed of runs
  tritium sample MODEL --prompt TEXT          generate text
  tritium chat MODEL                          chat in the terminal
  tritium classify MODEL < FILE               label each line with a classifier
  tritium import MODEL OUT_DIR                convert a published model, GGUF file, nanoGPT ckpt.pt
  tritium export MODEL OUT_DIR                write a folder that transformers opens
  tritium plan RECIPE --gpu NAME              estimate what a run needs: memory, time, price
  tritium bench COMMAND                       measure: kernels, codegen, train, predict, ...
  tritium check                               compare every operator with float64
  tritium info                                print versions, device, limits, caches

Each command has --help."""


# Packages of the extra `train` in setup.py. Without it the kernels work, and no command does.
_TRAIN_PACKAGES = (
    "numpy",
    "tiktoken",
    "rustbpe",
    "safetensors",
    "rich",
    "tyro",
    "matplotlib",
    "tomli",
)


def dispatch(argv: Sequence[str]) -> int:
    """Run one command. Returns: the exit status."""
    from . import __version__
    from .errors import InputError, unknown_name
    from .train.commands import COMMANDS, run_command

    if argv and argv[0] == "help":  # tritium help train is tritium train --help
        argv = [*argv[1:], "--help"]
    if argv[1:] == ["help"]:  # and so is tritium train help
        argv = [argv[0], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    name, *words = argv
    if name in ("-V", "--version"):
        print(f"tritium {__version__}")
        return 0
    if name in ("bench", "check"):
        from .train.run.signals import restore_default_signals

        restore_default_signals()
        if name == "check":
            from .bench.check import main
        else:
            from .bench.commands import bench as main
        return main(words)
    if name not in COMMANDS:
        raise InputError(unknown_name("command", name, [*COMMANDS, "bench", "check"]))
    return run_command(name, words)


def main() -> None:
    """Run the command line and exit with its status."""
    from .train.run.signals import end_at_once_on_signals

    end_at_once_on_signals()  # until the command is imported
    from .train.commands.cli import run

    sys.exit(run(_dispatch_if_installed, sys.argv[1:]))


def _dispatch_if_installed(argv: Sequence[str]) -> int:
    """Run one command, or say that a package of the extra `train` is missing."""
    try:
        return dispatch(argv)
    except ModuleNotFoundError as error:
        if error.name not in _TRAIN_PACKAGES:
            raise
        line = f"expected the package {error.name}, found none; pip install 'tritium[train]'"
        print(f"tritium: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    main()
