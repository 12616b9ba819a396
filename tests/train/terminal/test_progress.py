import io
import re
import sys
import types

import pytest

from tritium.train.terminal import progress as module
from tritium.train.terminal.progress import console, has_bars, progress, progress_bars

pytestmark = pytest.mark.plain


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """The output of a terminal of 100 columns."""
    output = io.StringIO()
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_file", output)
    monkeypatch.setattr(console, "_width", 100)
    return output


@pytest.fixture
def notebook(monkeypatch) -> list[str]:
    """The texts that a cell of a notebook has shown, one after the other."""
    shown = []

    class Handle:
        def update(self, content, *, raw):
            shown.append(content["text/plain"])

    def display(content, *, raw, display_id):
        shown.append(content["text/plain"])
        return Handle()

    package = types.ModuleType("IPython.display")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython.display", package)
    monkeypatch.setattr(console, "is_jupyter", True)
    monkeypatch.setenv("COLUMNS", "20")  # the width of the terminal that runs Jupyter
    monkeypatch.setattr(module, "_SECONDS_PER_UPDATE", 0.0)
    return shown


def test_without_a_terminal_there_is_no_bar(capsys):
    assert not has_bars()
    with progress("reading", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_done_and_total(terminal):
    assert has_bars()
    with progress_bars(has_count=True) as bars:
        task = bars.add_task("train", total=20, note="loss 3.1")
        bars.update(task, completed=5, refresh=True)
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", terminal.getvalue())
    assert re.search(r"train ━+╸ +5/20 loss 3\.1 0:00:00 left --:--", shown)


def test_long_lines_are_not_broken_and_bars_end_with_the_terminal(terminal):
    line = "a word " * 30
    with progress_bars() as bars:
        bars.add_task("train", total=20, note="x" * 200)
        console.print(line)
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    assert line in shown
    assert max(len(bar) for bar in shown if bar != line) <= 100


def test_a_quiet_console_has_no_bar(terminal, monkeypatch):
    monkeypatch.setattr(console, "quiet", True)
    assert not has_bars()
    with progress("reading", 10) as advance:
        advance(10)
    assert terminal.getvalue() == ""


def test_a_notebook_shows_one_text_that_is_replaced(notebook):
    """Without ipywidgets, and without control sequences of a terminal."""
    assert has_bars()
    with progress_bars(has_count=True) as bars:
        task = bars.add_task("train", total=4, note="")
        for step in range(4):
            bars.update(task, completed=step + 1)
    assert [" 4/4 " in text for text in notebook[-2:]] == [True, True]
    assert any(" 2/4 " in text for text in notebook)
    assert not any("\x1b" in text or "\n" in text for text in notebook)


def test_a_notebook_is_not_redrawn_at_each_step(notebook, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_PER_UPDATE", 60.0)
    with progress_bars(has_count=True) as bars:
        task = bars.add_task("train", total=20, note="")
        for _ in range(20):
            bars.update(task, advance=1)
    assert len(notebook) < 5
    assert " 20/20 " in notebook[-1]


def test_a_notebook_shows_a_transient_bar_when_some_work_is_done(notebook):
    with progress("preparing"):
        assert notebook == []
    with progress("reading", 4) as advance:
        advance(1)
        advance(3)
    assert "25%" in notebook[0]
    assert "100%" in notebook[-1]


def test_a_bar_ends_with_an_exception(terminal):
    with pytest.raises(KeyError), progress("reading", 3):
        raise KeyError
    with progress("reading", 3) as advance:  # a second bar can be shown
        advance(1)
