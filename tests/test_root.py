"""Programs started in the repository root, where the folder `kernels` is on Python's path.

transformers looks for the PyPI package `kernels`. Without the guards it finds our folder and fails.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[1]
IMPORT_TRANSFORMERS = "from transformers import GPT2LMHeadModel; print(GPT2LMHeadModel.__name__)"


def run_in_root(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_transformers_imports_in_the_root():
    done = run_in_root("-c", IMPORT_TRANSFORMERS)
    assert done.stdout.strip() == "GPT2LMHeadModel", done.stderr


def test_import_tritium_takes_the_root_off_the_path():
    code = "import tritium, importlib.util; print(importlib.util.find_spec('kernels'))"
    assert run_in_root("-c", code).stdout.strip() == "None"


def test_no_file_of_kernels_is_imported_outside_the_package():
    done = run_in_root("-c", "import kernels.norm.rms_norm")
    assert done.returncode == 1
    assert "No module named 'kernels.norm'" in done.stderr


def test_the_program_runs_in_the_root():
    done = run_in_root("-m", "tritium", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tritium ")


@pytest.mark.slow
def test_pytest_and_transformers_run_in_the_root(tmp_path):
    test = f"def test_import():\n    import tritium.kernels\n    {IMPORT_TRANSFORMERS}\n"
    (tmp_path / "test_import.py").write_text(test)
    done = run_in_root("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_torchrun_and_transformers_run_in_the_root(tmp_path):
    code = f"""{IMPORT_TRANSFORMERS}
import runpy, sys
sys.argv[1:] = ["--help"]
runpy.run_module("tritium.train", run_name="__main__")
"""
    (tmp_path / "program.py").write_text(code)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "1")
    done = run_in_root(*torchrun, str(tmp_path / "program.py"))
    assert done.stdout.startswith("GPT2LMHeadModel\nusage: tritium train"), done.stderr
