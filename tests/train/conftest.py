"""A corpus and a model that train in about a second, and ways to call the program."""

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tritium.__main__ import dispatch
from tritium.train import loop, session
from tritium.train.commands.cli import run

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards mix potions"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A text file of about 20 kB."""
    file = tmp_path / "corpus.txt"
    words = SENTENCE.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(300)]
    file.write_text("\n".join(lines))
    return file


@contextlib.contextmanager
def quiet_collector():
    """trainer.quiet_collector without its collection.

    That would examine everything that the tests have imported, which takes longer than the steps.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.fixture
def tiny(corpus, tmp_path, monkeypatch) -> list[str]:
    """Words of a `tritium train` command that takes about a second and writes tmp_path/run."""
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    # Drawing takes longer than the steps.
    monkeypatch.setattr(session, "plot_loss", lambda run: (run / "loss.png").touch())
    monkeypatch.setattr(loop, "quiet_collector", quiet_collector)
    options = {
        "data": corpus,
        "tokenizer": "bytes",
        "out": tmp_path / "run",
        "device": "cpu",
        "n-layer": 1,
        "n-head": 2,
        "d-model": 16,
        "context-tokens": 16,
        "steps": 20,
        "batch-size": 4,
        "warmup-steps": 2,
        "optimizer": "adamw",
        "lr": 3e-3,
        "min-lr": 1e-4,
        "eval-interval": 10,
        "eval-tokens": 64,
        "checkpoint-interval": 10,
        "keep-checkpoints": 5,
        "sample-tokens": 5,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["train", "laptop", *words]


@pytest.fixture
def tritium(capsys):
    """Run a command in this process: tritium("info") -> (status, stdout, stderr)."""

    def call(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = run(dispatch, [str(word) for word in words])
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def error_of(tritium):
    """Run a command that must exit with status 2 and one line on stderr. Return that line."""

    def call(*words) -> str:
        status, _, err = tritium(*words)
        lines = [line for line in err.splitlines() if line.startswith("tritium: ")]
        assert status == 2, err
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]

    return call


@functools.cache
def forking() -> subprocess.Popen:
    """Start the program that forks ranks, once. It ends with this process, which holds its stdin.

    Importing PyTorch takes seconds.
    """
    program = Path(__file__).with_name("ranks.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, program], **pipes)


@pytest.fixture
def launch(tmp_path):
    """Call train on several ranks: launch(2, *words) -> (status, stdout, stderr) of each rank.

    0 ranks: one process without torchrun. ranks.py describes `environment` and `more`.
    """

    def call(
        ranks: int, *words, environment=None, **more
    ) -> tuple[list[int], list[str], list[str]]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        environment = {"TRITIUM_HOME": os.environ.get("TRITIUM_HOME")} | (environment or {})
        job = {
            "words": [str(word) for word in words],
            "ranks": ranks,
            "folder": str(folder),
            "environment": environment,
        }
        print(json.dumps(job | more, default=str), file=forking().stdin, flush=True)
        status = json.loads(forking().stdout.readline())["status"]
        outputs = [(folder / f"{rank}.out").read_text() for rank in range(len(status))]
        errors = [(folder / f"{rank}.err").read_text() for rank in range(len(status))]
        return status, outputs, errors

    return call
