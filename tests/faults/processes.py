"""Starts `tritium` commands as processes that have imported everything: forks of this program.

It reads one request per line from stdin, as JSON, and answers with one line. Requests:

    {"start": words, "folder": F, "hook": code}    answer: {"pid": P}
        Runs `tritium words` with the output in F/out and F/err. `code` is executed before; it finds
        block(owner, name, seconds), which makes a function sleep before it runs.
    {"wait": P, "seconds": S}                      answer: {"status": exit status, or -signal}
        Kills the process after S seconds; the status is then null.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path


class Processes:
    """A connection to this program, for tests."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, __file__], **pipes)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()

    def start(self, words, folder: Path, hook: str = "") -> "Process":
        folder.mkdir(parents=True, exist_ok=True)
        words = [str(word) for word in words]
        answer = self._ask({"start": words, "folder": str(folder), "hook": hook})
        return Process(self, answer["pid"], folder)

    def _ask(self, request: dict) -> dict:
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


class Process:
    """A command that runs in another process."""

    def __init__(self, processes: Processes, pid: int, folder: Path):
        self._processes = processes
        self.pid = pid
        self._folder = folder

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for_phase(self, seconds: float = 100) -> None:
        """Wait until a function that the hook blocks is reached."""
        deadline = time.monotonic() + seconds
        while not (self._folder / "reached").exists():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def wait(self, seconds: float = 100) -> int | None:
        return self._processes._ask({"wait": self.pid, "seconds": seconds})["status"]

    @property
    def output(self) -> str:
        return "".join((self._folder / name).read_text() for name in ("out", "err"))


def _serve() -> None:
    from tritium.__main__ import dispatch
    from tritium.train import session
    from tritium.train.commands.cli import run
    from tritium.train.commands.training import train
    from tritium.train.run.signals import end_at_once_on_signals

    session.plot_loss = lambda run: None  # drawing takes longer than the run
    # Import the modules that a run imports later, and fill the cache of the parser.
    commands = "tritium.train.commands.training"
    for name in (
        *("numpy.ma", "torch._dynamo", "torch.utils.serialization"),
        *(f"{commands}._resume", f"{commands}._running"),
    ):
        importlib.import_module(name)
    train._parse_new_run(["laptop"])
    # The garbage collector of a command does not look at what this process has imported.
    gc.freeze()
    gc.unfreeze = lambda: None
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": _wait(request["wait"], request["seconds"])}
        else:
            pid = os.fork()
            if pid == 0:
                status = 70
                try:
                    _redirect(request["folder"])
                    # A background job of a shell ignores SIGINT, and nohup ignores SIGHUP.
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    signal.signal(signal.SIGHUP, signal.SIG_DFL)
                    end_at_once_on_signals()
                    exec(request["hook"], {"block": _blocker(request["folder"])})
                    # The streams of the server remember what kind of file they were opened for.
                    sys.stdout = os.fdopen(1, "w", closefd=False)
                    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
                    status = run(dispatch, request["start"])
                    sys.stdout.flush()
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _redirect(folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)


def _blocker(folder: str):
    def block(owner, name: str, seconds: float = 60, calls: int = 1) -> None:
        """Make the call number `calls` of a function create FOLDER/reached, and sleep first."""
        original = getattr(owner, name)
        counted = []

        def blocked(*arguments, **options):
            counted.append(None)
            if len(counted) == calls:
                Path(folder, "reached").touch()
                # Sleep in short pieces. If a signal arrives just as a sleep begins, Python handles
                # it only after that sleep.
                for _ in range(round(seconds / 0.05)):
                    time.sleep(0.05)
            return original(*arguments, **options)

        setattr(owner, name, blocked)

    return block


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    _serve()
