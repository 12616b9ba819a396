"""tritium check: right operators pass, and a wrong one fails."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritium.bench import check
from tritium.bench.ops import OPERATORS
from tritium.bench.record import read_record
from tritium.errors import InputError

pytestmark = pytest.mark.plain
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without_process(monkeypatch):
    """Check only what this process runs."""
    monkeypatch.setattr(check, "_run_interpreter", lambda operators: [])


def test_right_operators_pass_and_a_wrong_one_is_named(
    without_process, monkeypatch, capsys, tmp_path
):
    file = tmp_path / "check.json"
    assert check.main(["rms_norm", "--device", "cpu", "--json", str(file)]) == 0
    assert "1 checks passed" in capsys.readouterr().out
    (result,) = read_record(file, "check")["checks"]
    assert result["error"] is None

    right = OPERATORS["rms_norm"]
    wrong = dataclasses.replace(right, ours=lambda x, weight: right.ours(x, weight) * 1.001)
    monkeypatch.setitem(OPERATORS, "rms_norm", wrong)
    assert check.main(["rotary", "rms_norm", "--device", "cpu", "--json", str(file)]) == 1
    shown = capsys.readouterr()
    assert "WRONG: output 0 is off by" in shown.out
    assert "1 of 2 checks failed" in shown.err
    errors = {each["operator"]: each["error"] for each in read_record(file, "check")["checks"]}
    assert errors["rms_norm"].startswith("output 0 is off by")
    assert errors["rotary"] is None


def test_results_of_both_processes_are_reported(monkeypatch):
    wrong = {"operator": "rotary", "runs": "interpreter", "error": "dx is off"}
    monkeypatch.setattr(check, "_run_interpreter", lambda operators: [wrong])
    monkeypatch.setattr(check, "INTERPRET", False)
    monkeypatch.setattr(check, "HAS_TRITON", True)
    found = list(check._check_without_gpu([OPERATORS["rotary"]], torch.device("cpu")))
    assert [each["runs"] for each in found] == ["references", "interpreter"]
    assert found[-1] is wrong


def test_speeds_are_fractions_of_the_ceiling(monkeypatch):
    rotary = OPERATORS["rotary"]
    rotary = dataclasses.replace(rotary, shapes=(rotary.tiny_shape,))
    monkeypatch.setattr(check, "time_in_turn", lambda *_, **__: {"tritium": {"median": 0.5}})
    cost = rotary.cost(*rotary.tiny_shape, 2)
    moved = cost["fwd_bytes"] + cost["bwd_bytes"]
    limits = {"bytes_per_second": 8 * moved, "flops_per_second": 1.0}
    speeds = check._speeds([rotary], torch.device("cpu"), limits)
    assert speeds["rotary"]["share"] == pytest.approx(0.25)  # 2 of 8 per second


def test_unknown_operators_raise():
    with pytest.raises(InputError, match="unknown operator 'rms'"):
        check.main(["rms"])


def test_an_interpreter_that_fails_fails_the_check(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    (result,) = check._run_interpreter([OPERATORS["rotary"]])
    assert result["error"] == "the interpreter ended with status 1: no message"


@pytest.mark.slow
def test_a_planted_wrong_kernel_fails_the_check(tmp_path):
    """Break the backward kernel in a copy of the package, and check the copy."""
    copy = tmp_path / "tritium"
    ignored = shutil.ignore_patterns(".*", "tests", "runs", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, copy, ignore=ignored)
    file = copy / "kernels" / "norm" / "_kernels.py"
    source = file.read_text()
    right = "dx = "
    assert right in source
    file.write_text(source.replace(right, "dx = 1.01 * ", 1))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    words = ["-m", "tritium", "check", "layer_norm", "--device", "cpu", "--json", "check.json"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 1, done.stderr
    by_run = {
        each["runs"]: each for each in read_record(tmp_path / "check.json", "check")["checks"]
    }
    assert by_run["references"]["error"] is None
    assert by_run["interpreter"]["error"].startswith("dx is off by")
