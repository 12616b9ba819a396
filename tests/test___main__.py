import subprocess
import sys

import pytest

pytestmark = pytest.mark.plain


def shell(*command, folder):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder)


def test_statuses_reach_the_shell(tmp_path):
    """By each way in: as a module, and as the function that the installed command calls."""
    done = shell("-c", "from tritium.__main__ import main; main()", "--version", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "tritium 0.1.0\n")
    done = shell("-m", "tritium", "x", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
