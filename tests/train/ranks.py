"""Runs `tritium train` on several ranks as torchrun would.

Each rank is a fork of this process, which has imported all that they need. The program reads one
job per line from stdin, as JSON, and answers with one line: {"status": [one per rank]}.

    words          of the command, after `tritium train`
    ranks          number of ranks; 0: one process without torchrun
    folder         rank i writes to FOLDER/i.out and FOLDER/i.err
    environment    variables of all ranks; null unsets one
    signal         [run, rank, number]: once the run's folder has metrics, the rank gets the signal
    hook           Python code that each rank executes first, with its number in `rank`
    backend        of torch.compile

Like torchrun, this process hosts the store through which the ranks connect.
"""

import functools
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tritium.train import session
from tritium.train.commands.cli import run
from tritium.train.commands.training.train import _parse_new_run, main

for name in (
    "numpy.ma",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.utils.serialization",
    "tritium.train.commands.training._resume",
    "tritium.train.commands.training._running",
):
    importlib.import_module(name)
# Drawing takes longer than the run.
session.plot_loss = lambda run: None
# Imports what the parser needs, and fills its caches.
_parse_new_run(["laptop"])
# Keeps the garbage collector of each rank away from all that was imported, until the rank ends.
gc.freeze()
gc.unfreeze = lambda: None

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
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": True}
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
    exec(job.get("hook", ""), {"rank": rank})
    status = run(main, job["words"])
    sys.stdout.flush()
    return status


@functools.cache
def warm_up(backend: str) -> None:
    """Import what a first compilation needs, for all later ranks.

    The compiled function has no gradient. In a CUDA build of PyTorch, compiling a gradient starts
    threads of autograd. A process that was forked after that cannot run a backward.
    """
    torch.compile(lambda x: x.sin(), backend=backend)(torch.ones(1))
    torch._dynamo.reset()
    gc.freeze()


def has_metrics(run: str) -> bool:
    file = Path(run) / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def answer(job: dict) -> dict:
    """Fork the ranks of a job and wait for them."""
    if "backend" in job:
        warm_up(job["backend"])
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    status = [None] * max(1, job["ranks"])
    running = {}  # process id -> rank
    for rank in range(len(status)):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = work(job, rank, store.port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        running[pid] = rank
    deadline = time.monotonic() + SECONDS
    folder, target, number = job.get("signal", (None, None, None))
    while running and time.monotonic() < deadline:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            status[running.pop(pid)] = os.waitstatus_to_exitcode(code)
        elif folder is not None and has_metrics(folder):
            os.kill(next(pid for pid, rank in running.items() if rank == target), number)
            folder = None
        else:
            time.sleep(0.01)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"status": status}


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
