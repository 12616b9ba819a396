"""Bad input under torchrun: one line from one rank, status 2 on all."""

import re
import socket
import subprocess
import sys

import pytest
import torch

from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain


def error_on_all_ranks(done: tuple[list[int], list[str], list[str]]) -> str:
    """Return the line that one rank wrote when a command failed on all ranks."""
    status, _, errors = done
    assert status == [2] * len(status), errors
    lines = [
        [line for line in error.splitlines() if line.startswith("tritium: ")] for error in errors
    ]
    assert [len(found) for found in lines] == [1] + [0] * (len(lines) - 1), errors
    assert not any("Traceback" in error for error in errors)
    return lines[0][0]


@pytest.mark.parametrize(
    ("ranks", "words", "message"),
    [
        (
            0,
            ["--parallel", "fsdp", "--rank-timeout", 9],
            "--parallel, --rank-timeout: expected torchrun to start the program",
        ),
        (2, ["--batch-size", 5], "--batch-size: expected a multiple of 2 ranks, got 5"),
        (
            2,
            ["--batch-size", 6, "--micro-batch-size", 2],
            "a multiple of 2 ranks times micro-batches of 2, got 6",
        ),
        (
            2,
            ["--parallel", "zero1", "--tensor-parallel", 2],
            "--tensor-parallel: expected --parallel fsdp with it, got zero1",
        ),
        (
            2,
            ["--parallel", "ddp", "--shard-ranks", 2],
            "--shard-ranks: expected --parallel fsdp with it, got ddp",
        ),
        (
            2,
            ["--sharded-checkpoints", "on"],
            "--sharded-checkpoints: expected --parallel fsdp without --tensor-parallel with it",
        ),
        (
            2,
            ["--sharded-checkpoints", "on", "--tensor-parallel", 2],
            "--sharded-checkpoints: expected --parallel fsdp without --tensor-parallel with it",
        ),
        (
            2,
            ["--tensor-parallel", 3],
            "--tensor-parallel: expected a divisor of the 2 ranks, got 3",
        ),
        (
            2,
            ["--shard-ranks", 3],
            "--shard-ranks: expected a divisor of the 2 ranks that divide the batch, got 3",
        ),
        (
            2,
            ["--tensor-parallel", 2, "--n-head", 1],
            "--tensor-parallel: expected a divisor of the 1 heads",
        ),
        (
            2,
            ["--tensor-parallel", 2, "--n-kv-head", 1],
            "expected a divisor of the 1 key and value heads of a block, got 2",
        ),
        (
            2,
            ["--tensor-parallel", 2, "--precision", "float16"],
            "expected --precision bfloat16 or float32 with it, got float16",
        ),
        (
            2,
            ["--tensor-parallel", 2, "--optimizer", "muon"],
            "expected adamw with 2 tensor ranks, got muon; set --tensor-parallel to 1",
        ),
        (
            2,
            ["--device", "cuda:1"],
            "expected cpu or cuda under torchrun, which gives each rank its own, got cuda:1",
        ),
        (2, ["--parallel", "pipeline"], "invalid choice 'pipeline'"),
        (2, ["--data", "missing.txt"], "missing.txt"),
        (
            2,
            ["--lr", "1e9", "--grad-clip", 0, "--warmup-steps", 0],
            "training diverged: lower --lr",
        ),
    ],
)
def test_bad_options_stop_all_ranks(ranks, words, message, tiny, launch, tmp_path):
    assert message in error_on_all_ranks(launch(ranks, *tiny[1:], *words))
    assert not (tmp_path / "run").exists() or "diverged" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_stops_all_ranks(tiny, launch):
    assert "--device: expected a device that PyTorch finds here, got 'cuda'" in error_on_all_ranks(
        launch(2, *tiny[1:], "--device", "cuda")
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not set; start with torchrun, or unset RANK"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set; start with torchrun, or unset RANK"),
        (
            {"RANK": 2},
            "expected ranks from 0 below their number and a port, got RANK=2, WORLD_SIZE=2",
        ),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc; start with torchrun"),
        ({"LOCAL_WORLD_SIZE": "two"}, "expected ranks from 0 below their number"),
        ({"LOCAL_WORLD_SIZE": 3}, "expected ranks from 0 below their number"),
    ],
)
def test_incomplete_variables_of_torchrun_raise(environment, message, tiny, launch):
    assert message in error_on_all_ranks(launch(2, *tiny[1:], environment=environment))


def test_a_leftover_local_rank_raises(error_of, tiny, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "RANK is not set; start with torchrun, or unset LOCAL_RANK" in error_of(*tiny)


def test_an_error_on_rank_0_stops_all_ranks(tiny, launch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    assert "this one holds other files" in error_on_all_ranks(launch(2, *tiny[1:]))
    assert "expected the folder of a run" in error_on_all_ranks(
        launch(2, "--resume", tmp_path / "none")
    )


@pytest.mark.slow
def test_two_nodes_train_together(tiny, tmp_path):
    """Two agents of torchrun, on one machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
    ]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    nodes = [
        subprocess.Popen(
            [*launcher, "-m", "tritium.train", *tiny[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for _ in range(2)
    ]  # fmt: skip
    done = [node.communicate(timeout=100) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], done
    assert sorted(len(re.findall("validation loss .* over all", out)) for out, _ in done) == [0, 1]
    assert [row["step"] for row in read_metrics(tmp_path / "run")[0]] == list(range(20))
