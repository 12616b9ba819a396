import contextlib
import os
import sys

import pytest

from tritium.train.terminal.console import is_local_rank0, loading, lossy_output, print_from_handler

pytestmark = pytest.mark.plain


def test_output_without_a_reader_is_dropped(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with lossy_output():
        print("a" * 100_000, flush=True)
        print("b", file=sys.stderr)
    assert sys.stdout is stream
    with pytest.raises(BrokenPipeError):
        print("c", flush=True)
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_output_with_a_reader_arrives_in_order(monkeypatch):
    read, write = os.pipe()
    with os.fdopen(read) as reader, os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print("a", end=" ")
        with lossy_output():
            print("b", end=" ")
        print("c", flush=True)
        assert reader.readline() == "a b c\n"


def test_the_loading_line_is_shown_on_a_terminal_and_deleted(monkeypatch, capsys):
    with loading():
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with loading():
        assert capsys.readouterr().err == "loading PyTorch ...\r"
    assert capsys.readouterr().err.strip(" \r") == ""
    with loading(is_quiet=True):
        assert capsys.readouterr().err == ""


def test_lines_from_handlers_never_raise(monkeypatch, capfd):
    print_from_handler("line")
    assert capfd.readouterr().err == "line\n"
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(BrokenPipeError))
    print_from_handler("line")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, True),
        ({"RANK": "3", "LOCAL_RANK": "0"}, True),
        ({"RANK": "3", "LOCAL_RANK": "1"}, False),
    ],
)
def test_one_rank_of_each_node_prints(variables, expected, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_local_rank0() == expected
