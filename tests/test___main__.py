import os
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
    for words in ([], ["help"]):
        dispatch(words)
        assert capsys.readouterr().out == out


def test_help_of_a_command(capsys):
    for words in (["help", "info"], ["info", "help"]):
        assert dispatch(words) == 0
        assert capsys.readouterr().out.startswith("usage: tritium info")


def test_a_closed_pipe_and_an_ascii_terminal_are_no_errors(tmp_path):
    plan = [sys.executable, "-m", "tritium", "plan", "gpt2", "--gpu", "h100"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(plan, stdout=pipe, stderr=pipe, cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141

    code = "from tritium.train.commands.cli import run; run(lambda _: print('\\u03b1\\u2502'), [])"
    ascii_only = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | ascii_only, cwd=tmp_path
    )
    assert done.stdout == b"??\n", done.stderr


def test_without_the_extra_train_kernels_work_and_commands_say_what_to_install(tmp_path):
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('rich', 'tyro', 'tiktoken', 'rustbpe', 'safetensors'):\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import torch\n"
        "from tritium.kernels import rms_norm\n"
        "print(rms_norm(torch.ones(2, 4), torch.ones(4)).shape)\n"
        "from tritium.__main__ import main\n"
        "sys.argv = ['tritium', 'plan', 'laptop']\n"
        "main()\n"
    )
    done = run_python("-c", code, folder=tmp_path)
    assert done.stdout.startswith("torch.Size([2, 4])"), done.stderr
    assert done.returncode == 2
    assert done.stderr.startswith("tritium: expected the package ")
    assert done.stderr.endswith("found none; pip install 'tritium[train]'\n")


def test_unknown_command_suggests_the_nearest():
    with pytest.raises(InputError, match=r"unknown command 'trian'; did you mean 'train'\?"):
        dispatch(["trian"])
