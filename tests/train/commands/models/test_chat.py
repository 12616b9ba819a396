"""The command with a pipe, and in a terminal."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.model.models import random_model
from tritium.model import GPTConfig

pytestmark = pytest.mark.plain


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Words of `tritium chat` with a model that never ends an answer."""
    sizes = {"n_layer": 1, "n_head": 2, "d_model": 16, "vocab_size": 257, "context_tokens": 8192}
    llama = {"position": "rotary", "norm": "rms", "mlp": "swiglu", "bias": False}
    model = random_model(GPTConfig(**sizes, **llama))
    with torch.no_grad():
        model.wte.weight[256] = 0
    model.save_pretrained(tmp_path / "model")
    options = ("--tokenizer", "bytes", "--device", "cpu", "--temperature", "0")
    return ["chat", str(tmp_path / "model"), *options]


@pytest.fixture
def piped(tritium, monkeypatch, words):
    """Run the command with these lines as its input: piped("hi", ...) -> (status, out, err)."""

    def call(*lines: str, options=("--max-new-tokens", 5)) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return tritium(*words, *options)

    return call


def test_lines_of_a_pipe_are_questions_and_commands(piped, tmp_path):
    file = tmp_path / "chat.json"
    lines = ("hello", "", "/help", "again", f"/save {file}", "/reset", "/exit", "never read")
    status, out, err = piped(*lines)
    assert (status, err) == (0, "")
    messages = json.loads(file.read_text())
    assert [message["content"] for message in messages[::2]] == ["hello", "again"]
    assert all(message["content"] in out for message in messages[1::2])
    assert out.endswith("saved 4 messages\nthe conversation is empty\n")
    assert "/save FILE" in out


def test_bytes_that_are_not_utf8_are_questions_and_can_be_saved(
    tritium, monkeypatch, words, tmp_path
):
    file = tmp_path / "chat.json"
    lines = b"h\xffi\n/save %s\n" % str(file).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    status, _, err = tritium(*words, "--max-new-tokens", 5, "--system", "s\udcff")
    assert (status, err) == (0, "")
    contents = [message["content"] for message in json.loads(file.read_text("utf-8"))]
    assert contents[:2] == ["s?", "h\ufffdi"]


def test_bad_commands_are_one_line_and_the_conversation_goes_on(piped, tmp_path):
    (tmp_path / "file").touch()
    lines = ("/resett", "/save", f"/save {tmp_path / 'file'}", f"/save {tmp_path}/no/file", "hi")
    status, out, err = piped(*lines)
    assert status == 0
    assert out.strip()
    assert [line.removeprefix("tritium: ") for line in err.splitlines()] == [
        "unknown command '/resett'; did you mean '/reset'?",
        "/save: expected the name of a file, got none",
        f"{tmp_path / 'file'}: expected a new file, found one; give another name",
        f"{tmp_path}/no/file: expected an existing folder, found none; make it",
    ]


def test_bad_options_exit_with_one_line(error_of, words):
    assert "--stop: expected texts that are not empty" in error_of(*words, "--stop", "")
    assert "--min-p: expected in [0, 1], got 2.0" in error_of(*words, "--min-p", "2")
    assert "--max-new-tokens: expected at least 1" in error_of(*words, "--max-new-tokens", "0")


def read_until(terminal: int, pattern: bytes, seconds: float = 120, key: bytes = b"") -> None:
    """Read from a terminal until its output matches. Skip the codes that switch its modes.

    `key` is pressed again after 5 seconds of silence. Python can miss a Ctrl-C between the prompt
    of input() and its wait for keys.
    """
    found = b""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, re.sub(rb"\x1b\[\?\d+[lh]\r?", b"", found)):
        left = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([terminal], [], [], min(5.0, left) if key else left)
        if key and not ready and left:
            os.write(terminal, key)
            continue
        assert ready, found
        found += os.read(terminal, 4096)


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen):
    """Kill the process if the test fails. Popen would wait for it."""
    try:
        yield
    finally:
        process.kill()


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(words, tmp_path):
    """In a terminal, with the keys that a user presses."""
    terminal, other_end = pty.openpty()
    command = [sys.executable, "-m", "tritium", *words, "--max-new-tokens", "8000"]
    # setsid makes the terminal the one whose Ctrl-C the command gets.
    with (
        subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            cwd=tmp_path,
            # A shell makes its background jobs ignore Ctrl-C, and their children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process,
        killed_at_the_end(process),
    ):
        os.close(other_end)
        read_until(terminal, rb"\n> ")
        os.write(terminal, b"hello\n")
        read_until(terminal, rb"hello\r\n[^\r]")  # the answer has begun
        os.write(terminal, b"\x03")
        read_until(terminal, rb"\[stopped\]\r\n> ")
        os.write(terminal, b"/save chat.json\n")
        read_until(terminal, rb"saved 2 messages\r\n> ")
        os.write(terminal, b"\x03")
        read_until(terminal, rb"Ctrl-D or /exit leaves\r\n> ", key=b"\x03")
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    os.close(terminal)
    assert json.loads((tmp_path / "chat.json").read_text())[1]["content"]
