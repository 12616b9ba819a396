"""README's commands work, and those on files and lists of runs in docs/training.md.

The first two blocks of README are the ones that CI runs. tests/docs has the checks of all pages.
"""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from tritium import kernels
from tritium.__main__ import dispatch
from tritium.train.commands.cli import run

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
# (language, text) of each fenced block
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL_BLOCKS = [text for language, text in FENCED.findall(README) if language == "sh"]
# A command line, up to the two spaces before its explanation.
COMMAND = re.compile(r"^(?:\$ )?(tritium .+?)(?:  .*)?$", flags=re.MULTILINE)


def commands(text: str, language: str) -> list[str]:
    """Return the command lines in the blocks of a language. README's have no language."""
    return COMMAND.findall(
        "".join(block for found, block in FENCED.findall(text) if found == language)
    )


COMMANDS = commands(README, "")
# Options that make a shown `tritium train` take a second.
TINY_OPTIONS = {
    "data": "corpus.txt", "tokenizer": "bytes", "device": "cpu", "n-layer": 1, "n-head": 2,
    "d-model": 16, "context-tokens": 64, "steps": 2, "batch-size": 2, "eval-tokens": 64,
    "sample-tokens": 2,
}  # fmt: skip


def test_the_first_two_blocks_are_one_line_each():
    start = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "
    assert all(block.startswith(start) and block.count("\n") == 1 for block in SHELL_BLOCKS)
    assert SHELL_BLOCKS[0].endswith("&& .venv/bin/tritium train\n")
    tests = "&& .venv/bin/pytest -n 2 && TRITON_INTERPRET=1 .venv/bin/pytest -n 2\n"
    assert SHELL_BLOCKS[1].endswith(tests)


def test_ci_runs_the_second_block():
    script = (ROOT / ".ci" / "run").read_text()
    assert "block == 2" in re.search(r"awk '(.*?)' README.md", script)[1]


def test_the_table_of_operators_is_complete():
    rows = re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(kernels.__all__)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the text that the commands name, and a home for datasets."""
    text = "the quick brown fox jumps over a lazy dog\n" * 200
    (tmp_path / "corpus").mkdir()
    for name in ("corpus.txt", "input.txt", "corpus/a.txt"):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    return tmp_path


def test_train_resume_sample_and_chat_run(folder, monkeypatch):
    shown = [command for command in COMMANDS if command.startswith("tritium train")]
    assert len(shown) == 3
    for command in shown:
        words = shlex.split(command)[1:]
        if "--resume" not in words:
            if len(words) == 1:
                words.append("laptop")  # the default where there is no GPU
            for name, value in TINY_OPTIONS.items():
                if f"--{name}" in words:
                    words[words.index(f"--{name}") + 1] = str(value)
                else:
                    words += [f"--{name}", str(value)]
        assert run(dispatch, words) == 0, command
    record = {"instruction": "a", "input": "", "output": "b"}
    (folder / "records.json").write_text(json.dumps([record] * 9))
    tuning = next(command for command in COMMANDS if command.startswith("tritium finetune"))
    words = shlex.split("--template plain --epochs 1 --batch-size 2 --answer-tokens 2")
    assert run(dispatch, [*shlex.split(tuning)[1:], *words]) == 0
    sample = next(command for command in COMMANDS if command.startswith("tritium sample"))
    assert run(dispatch, [*shlex.split(sample)[1:], "--max-new-tokens", "2"]) == 0
    chat = next(command for command in COMMANDS if command.startswith("tritium chat"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n"))
    assert run(dispatch, shlex.split(chat)[1:]) == 0
    export = next(command for command in COMMANDS if command.startswith("tritium export"))
    assert run(dispatch, shlex.split(export)[1:]) == 0


@pytest.mark.slow
def test_options_in_a_file_and_pictures_of_runs(folder, capsys):
    lines = commands(TRAINING, "sh")
    printed, *shown = [each for each in lines if "config" in each or " plot " in each]
    assert len(shown) == 3
    words, _, file = printed.partition(" > ")
    assert run(dispatch, shlex.split(words)[1:]) == 0
    (folder / file).write_text(capsys.readouterr().out)
    tiny = [word for name, value in TINY_OPTIONS.items() for word in (f"--{name}", str(value))]
    for number, command in enumerate(shown, 1):
        words = shlex.split(command)[1:]
        if words[0] == "train":
            words += [*tiny, "--out", f"runs/laptop-{number}"]
        assert run(dispatch, words) == 0, command
    assert (folder / "both.png").is_file()
    assert run(dispatch, ["runs"]) == 0


def test_data_build_and_plan_run(folder):
    build = next(command for command in COMMANDS if "data build" in command)
    words = shlex.split(build.replace(" more.jsonl.gz", "").replace("bpe:8192", "bytes"))[1:]
    assert run(dispatch, words) == 0
    plan = next(command for command in COMMANDS if "tritium plan" in command and "--gpu" in command)
    assert run(dispatch, shlex.split(plan)[1:]) == 0


# Words added to a shown `tritium bench` command, so that it takes seconds on a CPU.
TINY_BENCH = {
    "kernels": "--device cpu --rounds 2 --shape 8x64",
    "codegen": "",
    "train": "--device cpu --steps 1 --context-tokens 16 --micro-batch-size 1",
    "traffic": "",
    "predict": "--batch-size 4 --micro-batch-size 2",
}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("tritium bench")])
def test_bench_commands_run(command, folder, capsys):
    words = shlex.split(command)[1:]
    if words[1] == "tune":
        if torch.cuda.is_available():
            pytest.skip("takes minutes on a GPU")
        assert run(dispatch, words) == 2
        assert "expected a GPU, found none" in capsys.readouterr().err
        return
    if "--nanogpt" in words:  # no checkout is here; test_implementations.py imports one
        at = words.index("--nanogpt")
        del words[at : at + 2]
    assert run(dispatch, words + TINY_BENCH[words[1]].split()) == 0
