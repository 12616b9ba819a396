"""Runs `tritium train` on several ranks as torchrun would.

Each rank is a fork of this process, which has imported all that they need. The program reads one
job per line from stdin, as JSON, and answers with one line: {"status": [one per rank]}.

    words          of the command, after `tritium train`
    ranks          number of ranks; 0: one process without torchrun
    folder         rank i writes to FOLDER/i.out and FOLDER/i.err
    environment    variables of all ranks; null unsets one
    stop           a run's folder: once it has metrics, the last rank gets SIGTERM
    backend        of torch.compile
"""

import functools
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from tritium.train import session
from tritium.train.commands.cli import run
from tritium.train.commands.train import main

for name in (
    "_dynamo",
    "distributed.checkpoint.state_dict",
    "distributed.fsdp",
    "distributed.optim",
):
    importlib.import_module(f"torch.{name}")
# Drawing takes longer than the run.
session.plot_loss = lambda run: None
# Keeps the garbage collector of each rank away from all that was imported.
gc.freeze()

SECONDS = 100


def work(job: dict, rank: int, port: int) -> int:
    """Run the command of a job as one rank. Returns: its exit status."""
    variables = {}
    if ranks := job["ranks"]:
        variables |= {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
        }
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in (variables | job["environment"]).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = str(value)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(
            os.open(f"{job['folder']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number
        )
    if "backend" in job:
        torch.compile = functools.partial(torch.compile, backend=job["backend"])
    status = run(main, job["words"])
    sys.stdout.flush()
    return status


def answer(job: dict) -> dict:
    """Fork the ranks of a job and wait for them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    status = [None] * max(1, job["ranks"])
    running = {}  # process id -> rank
    for rank in range(len(status)):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = work(job, rank, port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        running[pid] = rank
    deadline = time.monotonic() + SECONDS
    stop = Path(job["stop"]) / "metrics.jsonl" if "stop" in job else None
    while running and time.monotonic() < deadline:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            status[running.pop(pid)] = os.waitstatus_to_exitcode(code)
        elif stop is not None and stop.exists() and stop.stat().st_size:
            os.kill(max(running, key=running.get), signal.SIGTERM)
            stop = None
        else:
            time.sleep(0.01)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"status": status}


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
