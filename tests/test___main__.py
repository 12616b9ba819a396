import subprocess
import sys

import pytest

from tritium.__main__ import dispatch
from tritium.errors import InputError

pytestmark = pytest.mark.plain


def run_python(*words, folder):
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_command_and_module_exit_with_the_status(tmp_path):
    main = "from tritium.__main__ import main; main()"
    done = run_python("-c", main, "--version", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "tritium 0.1.0\n")
    done = run_python("-m", "tritium", "x", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_help_imports_no_torch(tmp_path):
    code = (
        "import sys; from tritium.__main__ import dispatch; dispatch([]); "
        "print('torch' in sys.modules)"
    )
    done = run_python("-c", code, folder=tmp_path)
    assert done.stdout.endswith("False\n"), done.stderr


def test_help_lists_every_command(capsys):
    assert dispatch(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("train", "data", "sample", "chat", "plan", "bench", "info"):
        assert f"tritium {name}" in out
    dispatch([])
    assert capsys.readouterr().out == out


def test_unknown_command_suggests_the_nearest():
    with pytest.raises(InputError, match=r"unknown command 'trian'; did you mean 'train'\?"):
        dispatch(["trian"])
