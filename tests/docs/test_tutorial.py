"""All blocks of the tutorial run in their order, with a tiny model and few records."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import DOCS, blocks

pytestmark = [pytest.mark.plain, pytest.mark.slow]

TINY = "--n-layer 1 --n-head 2 --d-model 32 --batch-size 2 --sample-tokens 2 --eval-tokens 256"
SMALLER = {"--steps 200": f"--steps 2 {TINY}", "--epochs 1": "--steps 2 --batch-size 2"}


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run shell commands in the folder of the tutorial, with `tritium` on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "tritium").write_text(f'#!/bin/sh\nexec {sys.executable} -m tritium "$@"\n')
    (programs / "tritium").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))

    def run(commands: str) -> None:
        for words, fewer in SMALLER.items():
            commands = commands.replace(words, fewer)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"

    return run


def test_all_blocks_run(shell, tmp_path, monkeypatch):
    folder = tmp_path / "tutorial"
    folder.mkdir()
    monkeypatch.chdir(folder)
    page = DOCS / "tutorial.md"
    python = blocks(page, "python")
    steps = [*python, *(each for each in blocks(page, "sh") if "pip install" not in each.parsed)]
    for step in sorted(steps, key=lambda each: each.line):
        if step in python:
            step.evaluate()
        else:
            shell(step.parsed)
        shorten(Path("records.jsonl"))


def shorten(records: Path, count: int = 12) -> None:
    if records.exists():
        records.write_text("".join(records.read_text().splitlines(keepends=True)[:count]))
