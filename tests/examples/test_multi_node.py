"""The Slurm script of examples/, with two nodes that are both this machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "multi_node.sbatch"
# Slurm's commands. srun starts the command on each node; both nodes are this machine.
COMMANDS = {
    "scontrol": "echo localhost\necho localhost\n",
    "srun": (
        'while [[ $1 == -* ]]; do shift; done\n"$@" & first=$!\n"$@" & wait $! && wait $first\n'
    ),
}


@pytest.fixture
def sbatch(tmp_path):
    """Run the script as Slurm would: sbatch(*words) -> the finished process."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "TRITIUM_HOME": str(tmp_path / "home"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NAME": "two-nodes",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "2",
    }

    def call(*words, **more) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", SCRIPT, *map(str, words)],
            env=os.environ | variables | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return call


@pytest.mark.slow
def test_two_nodes_train_one_model(sbatch, tmp_path):
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over a lazy dog\n" * 300)
    words = [
        *("laptop", "--data", "corpus.txt", "--tokenizer", "bytes", "--device", "cpu"),
        *("--n-layer", 1, "--n-head", 2, "--d-model", 16, "--context-tokens", 16),
        *("--batch-size", 8, "--warmup-steps", 2, "--sample-tokens", 5, "--eval-tokens", 64),
        *("--parallel", "fsdp", "--shard-ranks", 2, "--steps", 20),
    ]
    done = sbatch(*words, SLURM_JOB_END_TIME=str(int(time.time()) + 3600))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1
    run = tmp_path / "runs" / "two-nodes"
    assert [row["step"] for row in read_metrics(run)[0]] == list(range(20))
    assert 45 <= json.loads((run / "config.json").read_text())["train"]["max_minutes"] <= 50
