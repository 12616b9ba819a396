"""`--help` does not import PyTorch, whose import takes seconds."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.plain

COMMANDS = (
    ("train",),
    ("train", "gpt2"),
    ("finetune",),
    ("finetune", "instruct"),
    ("sample",),
    ("chat",),
    ("classify",),
    ("plan",),
    ("runs",),
    ("plot",),
    ("data", "build"),
    ("eval", "perplexity"),
    ("eval", "choice"),
    ("eval", "bleu"),
    ("info",),
    ("export",),
    ("import",),
)
CODE = """
import contextlib, io, sys
from tritium.__main__ import dispatch

out = io.StringIO()
for words in {commands}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        dispatch([*words, "--help"])
    print(*words, "torch" in sys.modules, out.getvalue().startswith(("usage:", "Fine-tune")))
    out.truncate(out.seek(0))
"""


def test_help_of_the_commands_does_not_import_torch(tmp_path):
    code = CODE.format(commands=COMMANDS)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    expected = "".join(f"{' '.join(words)} False True\n" for words in COMMANDS)
    assert done.stdout == expected, done.stderr
