"""The parts of bench/device.sh: what each of its commands runs, and for how long.

A command takes at most TOTAL_SECONDS. Each part is a program with a deadline in seconds after the
start of the command. A part that ends early leaves its time to the next parts. A part that is
stopped leaves its results so far. Two files are written after each part and every SAVE_SECONDS, so
that a command that is killed leaves them too:

    OUT_DIR/COMMAND.json      how each part ended, and every JSON that the parts wrote
    OUT_DIR/COMMAND.tar.gz    logs and plots

The files of the parts are in OUT_DIR/COMMAND/. Commit COMMAND.json under bench/results/GPU/:
`tritium bench report` reads the records in it.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..train.run.metrics import read_lines
from . import ROOT
from ._device_parts import COMMANDS, Part
from .record import FORMAT, provenance, write_record

SAVE_SECONDS = 15
# Lines of each log that are printed: the last ones.
LOG_LINES = 40
# Programs that run now.
_running: set[subprocess.Popen] = set()


# --- running a command


def run_part(part: Part, folder: Path, seconds: float, save: Callable[[], None]) -> dict[str, Any]:
    """Run a part for at most `seconds`. Return how it ended: done, failed, stopped or skipped.

    Args:
        save: called while the part runs.
    """
    if seconds < 1:
        return {"name": part.name, "status": "skipped", "seconds": 0.0, "last_line": ""}
    words = (
        word.replace("FOLDER", str(folder)).replace("PYTHON", sys.executable) for word in part.words
    )
    command = [part.program or sys.executable, *words]
    log = folder / f"{part.name}.log"
    began = time.monotonic()
    try:
        code = _wait(command, log, seconds, save)
    except FileNotFoundError:
        code = 127
        log.write_text(f"{command[0]} is not installed\n")
    lines = log.read_text(errors="replace").strip().splitlines()
    status = {None: "stopped", 0: "done"}.get(code, "failed")
    return {
        "name": part.name,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "last_line": _without_paths(lines[-1], folder) if lines else "",
        "failed_tests": re.findall(r"^(?:FAILED|ERROR) (\S+)", "\n".join(lines), re.MULTILINE),
    }


def _without_paths(line: str, folder: Path) -> str:
    """Return a line without the paths of this machine."""
    return line.replace(f"{folder.parent}/", "OUT_DIR/").replace(f"{ROOT}/", "")


def _wait(command: list[str], log: Path, seconds: float, save: Callable[[], None]) -> int | None:
    """Run a program with its output in `log`. Return its exit status, or None if it was stopped."""
    end = time.monotonic() + seconds
    with log.open("w") as output:
        # A session of its own, so that the workers of pytest are stopped with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
        _running.add(process)
        try:
            while (left := end - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, SAVE_SECONDS))
                save()
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _running.discard(process)


def _stop_all() -> None:
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run_command(name: str, out: Path, *, rehearse: bool, spent: float = 0.0) -> int:
    """Run a command of device.sh. Returns: exit status, 1 if a part did not end well.

    Args:
        out: where the two files are written.
        rehearse: whether to run tiny sizes on the CPU.
        spent: seconds that were spent before, on the installation.
    """
    began = time.monotonic() - spent
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    ends: list[dict[str, Any]] = []
    lock = threading.Lock()
    is_killed = threading.Event()

    def save() -> None:
        with lock:
            save_files(name, out, list(ends), rehearse=rehearse)

    def run(part: Part) -> None:
        end = run_part(part, folder, began + part.until - time.monotonic(), save)
        if is_killed.is_set():
            return
        ends.append(end)
        save()
        log = folder / f"{part.name}.log"
        if log.exists():
            lines = log.read_text(errors="replace").strip().splitlines()
            print("\n".join(lines[-LOG_LINES:]))
        print(f"--- {part.name}: {end['status']} after {end['seconds']:.0f} s", flush=True)

    groups: list[list[Part]] = []
    for part in COMMANDS[name](rehearse):
        if part.together:
            groups[-1].append(part)
        else:
            groups.append([part])
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            try:
                list(pool.map(run, group))
            except BaseException:
                # The threads wait for their programs. A killed command must not leave any.
                is_killed.set()
                _stop_all()
                raise
    print(f"{name}: {time.monotonic() - began:.0f} s in total; results in {out / name}.json")
    return int(any(end["status"] != "done" for end in ends))


def save_files(name: str, out: Path, ends: list[dict[str, Any]], *, rehearse: bool) -> None:
    """Write OUT/NAME.json and OUT/NAME.tar.gz from the files that the parts wrote so far."""
    folder = out / name
    records = {}
    for path in sorted(folder.rglob("*.json")):
        with contextlib.suppress(ValueError, OSError):  # a file that is written or deleted now
            record = json.loads(path.read_text())
            # A tokenizer has a kind, but no provenance.
            if isinstance(record, dict) and {"kind", "commit"} <= record.keys():
                records[str(path.relative_to(folder))] = record
    if rows := _rows_of_runs(folder):
        here = provenance()
        device = "cuda" if here["gpu"] else "cpu"
        records["runs"] = {"kind": "runs", "format": FORMAT, **here, "device": device, "rows": rows}
    figures = {"command": name, "is_rehearsal": rehearse, "parts": ends, "records": records}
    write_record(out / f"{name}.json", "device", figures)
    archive = out / f"{name}.tar.gz"
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".log", ".png", ".txt", ".jsonl", ".json"):
                tar.add(path, arcname=str(path.relative_to(out)))
    partial.replace(archive)


def _rows_of_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the options, evaluations and seconds of the training runs in a folder."""
    rows = []
    for config in sorted(folder.rglob("config.json")):
        run = config.parent
        if run.name == "fill":  # its only purpose is to fill caches
            continue
        with contextlib.suppress(ValueError, OSError, KeyError):  # not a run, or not begun
            train = json.loads(config.read_text())["train"]
            train.pop("out")  # a path of this machine
            lines = read_lines(run)
            losses = [[line["step"], line["val_loss"]] for line in lines if "val_loss" in line]
            # Only the end of a run has the seconds of all its steps.
            ends = [line for line in lines if line.get("wall_seconds")]
            is_complete = ends and ends[-1]["step"] == train["steps"]
            seconds = ends[-1]["wall_seconds"] if is_complete else None
            name = str(run.relative_to(folder))
            rows.append({"name": name, "train": train, "evaluations": losses, "seconds": seconds})
    return rows


def main(argv: Sequence[str]) -> int:
    """Run a command of device.sh, with the words that the script passes."""
    parser = argparse.ArgumentParser(prog="bench/device.sh")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--spent", type=float, default=0.0)
    options = parser.parse_args(argv)
    # A killed command must stop its part, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run_command(
        options.command, options.out.resolve(), rehearse=options.rehearse, spent=options.spent
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
