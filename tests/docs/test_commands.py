"""The command lines of the documentation have options that exist. No command runs."""

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tyro

from tritium.__main__ import dispatch
from tritium.errors import InputError
from tritium.train.commands.models.chat import ChatOptions
from tritium.train.commands.models.import_model import ImportOptions
from tritium.train.commands.models.sample import SampleOptions
from tritium.train.commands.training import _resume, _running
from tritium.train.commands.training import train as train_command
from tritium.train.commands.training._resume import ResumeOptions
from tritium.train.config import PART_OF
from tritium.train.distributed.launch import Launch

from .pages import DOCS, PAGES, ROOT, blocks, name

pytestmark = pytest.mark.plain

# Programs of shells and systems. Their words are not checked.
OTHER_PROGRAMS = {"cat", "cd", "echo", "mkdir", "pytest", "ruff", "run", "all", "unzip"}
# The words that end one command and begin the next, and those that a file follows.
SEPARATORS = {"|", "&&", "||", ";", "&"}
REDIRECTIONS = {"<", ">", ">>"}


# Pages that name options of `tritium train`, `sample`, `chat` and `import` in their text.
TRAINING_PAGES = (PAGES[0], DOCS / "training.md", DOCS / "models.md", DOCS / "scaling-out.md")
OPTIONS = (Launch, SampleOptions, ChatOptions, ImportOptions, ResumeOptions)


class ParsedError(Exception):
    """Raised instead of running a command whose words are valid."""


def commands(shell: str) -> Iterator[list[str]]:
    """Yield the words of each command, without redirections and variables in front."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words, is_file = [], False
        for word in [*lexer, ";"]:
            if word in SEPARATORS:
                if words:
                    yield words
                words = []
            elif word in REDIRECTIONS:
                is_file = True
            elif is_file:
                is_file = False
            elif words or not re.match(r"\w+=", word):
                words.append(word)


class Checker:
    """Check the words of a command. An unknown program or option raises. Nothing runs.

    Args: monkeypatch: replaces the functions that would run a command.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._patch = monkeypatch
        self._programs = {
            "tritium": self._tritium,
            "torchrun": self._torchrun,
            "python": self._python,
            "python3": self._python,
            "pip": self._pip,
            "sbatch": self._sbatch,
        }

    def __call__(self, words: list[str]) -> None:
        program = Path(words[0]).name
        if program not in OTHER_PROGRAMS:
            self._programs[program](words[1:])

    def _tritium(self, words: list[str]) -> None:
        if words[:1] == ["train"]:
            self._train(words[1:])
            return
        if words[:2] != ["eval", "lm-eval"]:  # which has the parser of lm_eval
            self._parse(lambda: dispatch(words))

    def _parse(self, command: Callable[[], object]) -> None:
        """Run a command up to the end of its parser."""

        def parse_and_stop(*args, cli=tyro.cli, **keywords):
            cli(*args, **keywords)
            raise ParsedError

        with self._patch.context() as patch:
            patch.setattr(tyro, "cli", parse_and_stop)
            with pytest.raises(ParsedError):
                command()

    def _train(self, words: list[str]) -> None:
        def stop(*_, **__):
            raise ParsedError

        if "--config" in words:  # the file is not here
            at = words.index("--config")
            words = [*words[:at], *words[at + 2 :]]
        words = [word for word in words if word != "--print-config"]
        with self._patch.context() as patch:
            for module in (_running, _resume):
                patch.setattr(module, "join", stop)
            with pytest.raises(ParsedError):
                train_command.main(words)

    def _torchrun(self, words: list[str]) -> None:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words)
        assert parsed.module
        assert parsed.training_script == "tritium.train"
        self._train(parsed.training_script_args)

    def _python(self, words: list[str]) -> None:
        if words[0] != "-m":
            assert (ROOT / words[0]).is_file(), f"{words[0]} does not exist"
        elif words[1] not in ("venv", "pytest"):
            module = importlib.import_module(words[1])
            self._parse(lambda: module.main(words[2:]))

    def _sbatch(self, words: list[str]) -> None:
        script = next(at for at, word in enumerate(words) if word.endswith(".sbatch"))
        self._train(words[script + 1 :])

    def _pip(self, words: list[str]) -> None:
        setup = (ROOT / "setup.py").read_text()
        for extras in re.findall(r"(?:tritium|\.)\[([\w,-]+)\]", " ".join(words)):
            for extra in extras.split(","):
                assert f'"{extra}": ' in setup, f"no extra {extra}"


@pytest.fixture
def check(monkeypatch) -> Checker:
    return Checker(monkeypatch)


def readme_commands() -> str:
    """Return the command lines in README's blocks without a language, without explanations."""
    text = PAGES[0].read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    plain = "".join(block for language, block in fenced if not language)
    return "\n".join(re.findall(r"^(?:\$ )?(tritium .+?)(?:  .*)?$", plain, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_options_that_exist(page, check):
    shells = [(block.parsed, f"{name(page)}:{block.line}") for block in blocks(page, "sh")]
    if page == PAGES[0]:
        shells.append((readme_commands(), name(page)))
    for shell, place in shells:
        for words in commands(shell):
            try:
                check(words)
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                pytest.fail(f"{place}: {shlex.join(words)}: {type(error).__name__}: {error}")


def test_an_unknown_option_is_found(check):
    with pytest.raises(InputError, match="--lerning-rate"):
        check(["tritium", "train", "laptop", "--lerning-rate", "1"])
    with pytest.raises(InputError, match="unknown recipe"):
        check(["tritium", "train", "labtop"])
    with pytest.raises(KeyError):
        check(["tritum", "train"])


def test_options_named_in_the_text_are_parsed(check):
    """`--option` must exist. `--option value` must be valid; capitals stand for a value."""
    text = "".join(page.read_text(encoding="utf-8") for page in TRAINING_PAGES)
    options = set(re.findall(r"`(--[a-z][a-z0-9 -]*?)(?: ([A-Z]+))?`", text))
    assert ("--recompute", "") in options
    for option, placeholder in options:
        name, *values = option.split()
        # The test above has a model and a run. torchrun has --max-restarts.
        if placeholder == "MODEL" or name in ("--resume", "--max-restarts"):
            continue
        if not values and not placeholder:
            field = name.removeprefix("--").replace("-", "_")
            known = field in PART_OF or any(field in cls.__dataclass_fields__ for cls in OPTIONS)
            assert known, name
            continue
        check(["tritium", "train", "laptop", name, *(values or ["2"])])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_json_and_toml_are_valid(page):
    for block in blocks(page, "json"):
        for line in block.parsed.splitlines():
            assert json.loads(line) is not None  # raises for a broken line
    if sys.version_info >= (3, 11):
        import tomllib

        for block in blocks(page, "toml"):
            assert tomllib.loads(block.parsed)  # raises for a broken block
