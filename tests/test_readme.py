"""README's commands are the ones that work and that CI runs."""

import re
from pathlib import Path

import pytest
import torch

from tritium import kernels
from tritium.train.distributed.tensor_parallel import check_tensor_parallel
from tritium.train.recipes import RECIPES

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_first_two_blocks_are_one_line_each():
    for block in BLOCKS[:2]:
        assert block.count("\n") == 1
        assert block.startswith(
            "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "
        )
    assert BLOCKS[0].endswith("&& .venv/bin/tritium train\n")
    assert re.search(
        r"&& \.venv/bin/pytest -n 2 && TRITON_INTERPRET=1 \.venv/bin/pytest -n 2\n$", BLOCKS[1]
    )


def test_ci_runs_the_second_block():
    script = (ROOT / ".ci" / "run").read_text()
    awk = re.search(r"awk '(.*?)' README.md", script).group(1)
    assert "block == 2" in awk
    assert "bash -euo pipefail -c" in script


def test_what_the_first_line_needs_is_installed_by_it():
    setup = (ROOT / "setup.py").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    assert '"tritium = tritium.__main__:main"' in setup
    assert "torch==2.13.0" in constraints
    assert "triton==3.7.1" in constraints


def test_named_recipes_and_operators_exist():
    line = next(line for line in README.splitlines() if line.startswith("Recipes: "))
    assert re.findall(r"`([a-z0-9-]+)`", line)[: len(RECIPES)] == list(RECIPES)
    imported = ", ".join(re.findall(r"from tritium\.kernels import (.*)", README)).split(", ")
    assert imported == sorted(kernels.__all__)
    table = re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)
    assert {name for row in table for name in re.findall(r"`(\w+)`", row)} == set(kernels.__all__)


def test_commands_shown_are_parsed(tmp_path, monkeypatch):
    """Every `tritium train ...` line with options is understood, though not run."""
    from tritium.train.commands import train

    understood = []
    monkeypatch.setattr(
        train, "_run_and_report", lambda run, world, work: understood.append(run) or 0
    )
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^tritium (train(?= +[a-z-]).*?)(?:  .*)?$", README, flags=re.MULTILINE)
    for line in lines:
        assert train.main(line.split()[1:]) == 0
    assert len(lines) >= 4
    assert len(understood) == len(lines)


def test_tensor_ranks_shown_divide_the_heads_of_the_run():
    shown = re.findall(r"runs/([a-z0-9-]+)-\d+ --tensor-parallel (\d+)", README)
    assert shown
    for name, ranks in shown:
        check_tensor_parallel(RECIPES[name].gpt(vocab_size=1), torch.bfloat16, int(ranks))
