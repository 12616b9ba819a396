"""Writes docs/faults.md from the tests of this folder: one row per test function.

Tests record what they measured with pytest's `record_property` under the names in COLUMNS.
"""

import datetime
import platform
import shlex
import subprocess
from pathlib import Path

import pytest

# Name of a property -> title of its column, and how to join the values of all cases of a test.
COLUMNS = {
    "faults": ("faults", sum),
    "recovered": ("recovered bitwise", sum),
    "steps_lost": ("steps lost at most", max),
    "seconds_to_stop": ("seconds to stop at most", max),
}
HEADER = """\
# Fault tests

Written by `{command}` on {date}, from commit {commit}, on {machine}.

These tests kill and stop runs, fill disks and damage files. They check that a run then continues
with the same result, or ends with one line that says why. Each row is a test.

| column | meaning |
| --- | --- |
| passed, failed | cases; one of a fuzz test tries 50 or 1,000 files, or 20 or 300 commands |
| faults | kills, signals, full disks and other faults that the cases caused |
| recovered bitwise | faults after which the run ended with the weights of a run without it |
| steps lost at most | steps that the resumed run had to compute again |
| seconds to stop at most | from a signal to the end of the process, including its checkpoint |
| - | the test does not measure this |

A test of kills or saves fails if a named checkpoint is damaged, if a file is left over, or if the
run does not start again.

All tests run processes on a CPU. They do not cover CUDA, several machines or a power cut.

"""
INTERRUPTED = "The command was interrupted, so cases are missing.\n\n"


class FaultTable:
    """A plugin that collects the reports of the fault tests, and writes the table at the end."""

    def __init__(self, config: pytest.Config, file: Path):
        self.file = file
        # Read now, because the repository can change while the tests run.
        self.header = _header(shlex.join(["pytest", *config.invocation_params.args]))
        # Name of a test -> outcomes, and values of each property.
        self.outcomes: dict[str, list[str]] = {}
        self.values: dict[str, dict[str, list[float]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A fixture that fails is a failure of its test.
        if report.when != "call" and not report.failed:
            return
        path, _, name = report.nodeid.partition("::")
        name = f"{Path(path).stem}::{name.partition('[')[0]}"
        self.outcomes.setdefault(name, []).append(report.outcome)
        values = self.values.setdefault(name, {})
        for key, value in report.user_properties:
            if key in COLUMNS:
                values.setdefault(key, []).append(value)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        titles = ["test", "passed", "failed", *(title for title, _ in COLUMNS.values())]
        rows = [titles, ["---"] * len(titles), *map(self._row, sorted(self.outcomes))]
        table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        note = INTERRUPTED if exitstatus == pytest.ExitCode.INTERRUPTED else ""
        self.file.write_text(self.header + note + table)

    def _row(self, name: str) -> list[str]:
        file, _, test = name.partition("::")
        sentence = test.removeprefix("test_").replace("_", " ")
        topic = file.removeprefix("test_").replace("_", " ")
        outcomes = self.outcomes[name]
        cells = [f"{topic}: {sentence}"]
        cells += [str(outcomes.count(outcome)) for outcome in ("passed", "failed")]
        for key, (_, join) in COLUMNS.items():
            values = self.values[name].get(key)
            cells.append(f"{join(values):.3g}" if values else "-")
        return cells


def _header(command: str) -> str:
    def git(*words: str) -> str:
        call = ["git", *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if lines:
            cpu = f"{len(lines)} cores of an {lines[0].partition(': ')[2]} CPU"
    date = datetime.datetime.now().date()
    return HEADER.format(command=command, date=date, commit=commit, machine=cpu)
