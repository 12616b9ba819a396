"""Progress bars in a terminal and in a notebook. Other outputs get lines, and no bars.

A notebook shows one output that is replaced twice per second. It needs IPython only: rich's own
bars in notebooks need ipywidgets.
"""

import contextlib
import io
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

# Lines are not broken at the width of the terminal, so that `grep` finds them in a log.
console = Console(stderr=True, highlight=False, soft_wrap=True)
# A refresh takes 1.3 ms of the core that also starts the steps (AMD EPYC, 26 November 2026): at
# rich's default of 10 per second 1.3 %, at this rate 0.5 %.
_REFRESHES_PER_SECOND = 4
_SECONDS_PER_UPDATE = 0.5
_NOTEBOOK_COLUMNS = 100


def table_console(columns: int) -> Console:
    """Return a console for tables on stdout: as wide as the terminal, elsewhere `columns` wide."""
    return Console(width=None if Console().is_terminal else columns)


def has_bars() -> bool:
    """Return whether this process shows progress bars."""
    return not console.quiet and (console.is_terminal or console.is_jupyter)


def progress_bars(*, has_count: bool = False, transient: bool = False) -> Progress:
    """Return rich's Progress with the columns: description, bar, count, note, elapsed and remaining
    time.

    A task has the field `note`. If this process shows no bars, the Progress is disabled.

    Args:
        has_count: whether to show "3/10" instead of "30%".
        transient: whether a terminal deletes the bars at the end. A notebook cannot delete an
            output, so there transient bars appear only after some work is done.
    """
    # In a narrow terminal only the bar becomes shorter.
    count = MofNCompleteColumn if has_count else TaskProgressColumn
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        count(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("left"),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    ]
    if console.is_jupyter and not console.quiet:
        return _NotebookProgress(*columns, is_transient=transient)
    return Progress(
        *columns,
        console=console,
        disable=not has_bars(),
        transient=transient,
        refresh_per_second=_REFRESHES_PER_SECOND,
    )


@contextlib.contextmanager
def progress(label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """Show a bar while the context lasts. Yields: a function that adds finished work.

    Args: total: amount of work. None: not known.
    """
    with progress_bars(transient=True) as bars, task_of(bars, label, total) as advance:
        yield advance


@contextlib.contextmanager
def task_of(bars: Progress, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Add a task to bars while the context lasts. Yields: a function that adds finished work."""
    task = bars.add_task(label, total=total, note="")
    try:
        yield lambda amount: bars.update(task, advance=amount)
    finally:
        bars.remove_task(task)


class _NotebookProgress(Progress):
    """Bars as text in the output of a cell."""

    def __init__(self, *columns: ProgressColumn, is_transient: bool):
        # rich would draw for a terminal, or look for ipywidgets.
        screen = Console(
            file=io.StringIO(),
            width=_NOTEBOOK_COLUMNS,
            force_jupyter=False,
            force_terminal=False,
        )
        super().__init__(*columns, console=screen, auto_refresh=False)
        self._is_transient = is_transient
        self._is_running = False
        self._output = None
        self._last_shown = 0.0

    def start(self) -> None:
        """Show the bars from now on."""
        self._is_running = True
        self.refresh()

    def stop(self) -> None:
        """Show the last state."""
        self.refresh()
        self._is_running = False

    def refresh(self) -> None:
        """Show the bars, or replace the text that is shown."""
        is_hidden = self._is_transient and not any(task.completed for task in self.tasks)
        if not self._is_running or self.disable or is_hidden:
            return
        self._last_shown = time.monotonic()
        if self._output is not None:
            self._output.update(self._content(), raw=True)
            return
        from IPython.display import display

        self._output = display(self._content(), raw=True, display_id=True)

    def update(self, task_id: TaskID, **changes) -> None:
        """Change a task, and show the bars at most every _SECONDS_PER_UPDATE."""
        super().update(task_id, **changes)
        if time.monotonic() - self._last_shown > _SECONDS_PER_UPDATE:
            self.refresh()

    def _content(self) -> dict[str, str]:
        with self.console.capture() as captured:
            self.console.print(self.get_renderable())
        return {"text/plain": captured.get().rstrip()}
