import subprocess
import sys

import pytest

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("command", [["-m", "tritium"], ["-c", "from tritium.__main__ import main; main()"]])
def test_statuses_reach_the_shell(command, tmp_path):
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "tritium 0.1.0\n")
    done = subprocess.run([sys.executable, *command, "x"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
