"""Ranks that die, hang or fail: all ranks end, one line names the rank, and the run resumes."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM

import pytest

from tests.train.conftest import corpus, launch, tiny  # noqa: F401 - fixtures
from tritium.train.distributed.heartbeat import RANK_LOST
from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain

STEPS = 30
# Seconds after which a rank counts as hung.
TIMEOUT = 3
# Code that a rank executes when it has done 14 steps.
FAULT = """
from tritium.train import trainer
if rank == {rank}:
    update = trainer.Trainer.update
    calls = []
    def faulty(self, *arguments):
        calls.append(None)
        if len(calls) == 15:
            {fault}
        return update(self, *arguments)
    trainer.Trainer.update = faulty
"""
SIGNAL = "import os; os.kill(os.getpid(), {:d})"
# The batches of a rank are read by a thread. It hangs, and the main thread waits for it.
HANG = """
import time
from tritium.train.data import loader
if rank == 1:
    batch = loader.Loader.batch
    def hanging(self, step):
        if step == 15:
            time.sleep(1000)
        return batch(self, step)
    loader.Loader.batch = hanging
"""
NAN = """
from tritium.train import trainer
if rank == 1:
    loss = trainer.batch_loss
    calls = []
    def not_finite(*arguments):
        calls.append(None)
        return loss(*arguments) * (float("nan") if 15 <= len(calls) < 25 else 1)
    trainer.batch_loss = not_finite
"""


# A rank that finds a damaged shard when it reads the batch of step 15.
DAMAGE = """
from tritium.train.data import loader, shards
if rank == 1:
    batch = loader.Loader.batch
    def damaged(self, step):
        if step == 15:
            raise shards.DataChanged("train-00000.bin: cut short")
        return batch(self, step)
    loader.Loader.batch = damaged
"""


@pytest.fixture
def words(tiny, tmp_path) -> list:  # noqa: F811
    """Words of a run of some seconds."""
    return [*tiny[1:], "--steps", STEPS, "--eval-interval", 1000, "--checkpoint-interval", 10]


def our_lines(errors: list[str]) -> list[str]:
    assert not any("Traceback" in error for error in errors), errors
    return [line for error in errors for line in error.splitlines() if line.startswith("tritium:")]


def weights(run: Path) -> list[bytes]:
    folder = run / "checkpoints" / f"step-{STEPS}"
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


# Ranks, engine, the rank that gets a signal, and the signal.
LOST = [
    (2, "ddp", 0, SIGSTOP),
    *(
        pytest.param(ranks, engine, ranks - 1, number, marks=pytest.mark.slow)
        for ranks in (2, 4)
        for engine in ("ddp", "zero1", "fsdp")
        for number in (SIGKILL, SIGSTOP)
    ),
]


@pytest.mark.parametrize(("ranks", "engine", "lost", "number"), LOST)
def test_a_lost_rank_is_named_and_the_run_resumes_bitwise(
    ranks, engine, lost, number, words, launch, tmp_path, record_property  # noqa: F811
):  # fmt: skip
    run = tmp_path / "run"
    words += ["--parallel", engine, "--rank-timeout", TIMEOUT]
    began = time.monotonic()
    hook = FAULT.format(rank=lost, fault=SIGNAL.format(number))
    status, _, errors = launch(ranks, *words, hook=hook)
    assert time.monotonic() - began < 60
    assert status == [-SIGKILL if rank == lost else RANK_LOST for rank in range(ranks)], errors
    record_property("faults", 1)
    [line] = our_lines(errors)
    what = "died" if number == SIGKILL else "hangs"
    assert re.match(rf"tritium: rank {lost} {what}.*; last words: (before|after) .*, in ", line)
    if lost == 0:
        return

    # torchrun starts the same command again.
    status, _, errors = launch(ranks, *words, environment={"TORCHELASTIC_RESTART_COUNT": 1})
    assert status == [0] * ranks, errors
    never_lost = tmp_path / "never-lost"
    status, _, errors = launch(ranks, *words, "--out", never_lost)
    assert status == [0] * ranks, errors
    assert weights(run) == weights(never_lost)
    record_property("recovered", 1)


@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        (2, "ddp"),
        pytest.param(4, "zero1", marks=pytest.mark.slow),
        pytest.param(4, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_in_python_is_named_with_its_place(
    ranks, engine, words, launch, record_property  # noqa: F811
):  # fmt: skip
    words += ["--parallel", engine, "--rank-timeout", TIMEOUT]
    status, _, errors = launch(ranks, *words, hook=HANG)
    assert status[1] in (-SIGKILL, RANK_LOST), errors
    assert {*status[:1], *status[2:]} == {RANK_LOST}, errors
    record_property("faults", 1)
    [line] = our_lines(errors)
    assert "rank 1 hangs: no progress for 3 s (process" in line
    assert re.search(r"last words: after \d+ steps, in Prefetch.*train/data/prefetch.py:", line)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("ArithmeticError('bits flipped')", [RANK_LOST, 70], "ArithmeticError: bits flipped"),
        pytest.param(
            *("__import__('tritium').errors.InputError('shard damaged')", [2, 2], "shard damaged"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_on_one_rank_ends_all_ranks(error, status, message, words, launch):  # noqa: F811
    found, _, errors = launch(2, *words, hook=FAULT.format(rank=1, fault=f"raise {error}"))
    assert found == status, errors
    [line] = [line for each in errors for line in each.splitlines() if line.startswith("tritium:")]
    assert line.startswith(f"tritium: rank 1 failed: {message}; last words: after 14 steps, in ")
    assert "Traceback" not in errors[0]
    assert ("Traceback" in errors[1]) == (status[1] == 70)


def test_a_damaged_shard_on_one_rank_leaves_a_checkpoint_of_all_ranks(
    words, launch, tmp_path, record_property  # noqa: F811
):  # fmt: skip
    status, _, errors = launch(2, *words, hook=DAMAGE)
    assert status == [2, 2], errors
    assert our_lines(errors) == ["tritium: train-00000.bin: cut short"]
    assert (tmp_path / "run" / "checkpoints" / "step-15").is_dir()
    record_property("faults", 1)
    record_property("steps_lost", 0)


def test_nan_on_one_rank_is_judged_alike_by_all_ranks(words, launch):  # noqa: F811
    status, _, errors = launch(2, *words, hook=NAN)
    assert status == [0, 0], errors
    assert errors[0].count("bad steps in a row; restored the checkpoint of step 10") == 1
    assert errors[1] == ""


# --- torchrun itself


@pytest.fixture
def torchrun(tmp_path):
    """Start torchrun with two ranks, and return its process."""

    def call(*words, options=()) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command = [*launcher, *options, "-m", "tritium.train", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([str(word) for word in command], cwd=tmp_path, **pipes)

    return call


def wait_for_metrics(run: Path) -> None:
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
        assert time.monotonic() < end
        time.sleep(0.01)


def ranks_of(agent: subprocess.Popen) -> list[int]:
    """Return the process ids of the ranks, in their order."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


@pytest.mark.slow
@pytest.mark.parametrize("with_out", [True, False])
def test_torchrun_resumes_by_itself(with_out, words, torchrun, tmp_path):
    """Also without --out: the ranks find the folder of the first attempt."""
    words += ["--steps", 200, "--checkpoint-interval", 50]
    if not with_out:
        at = words.index("--out")
        del words[at : at + 2]
    run = tmp_path / "run" if with_out else tmp_path / "runs" / "laptop-1"
    agent = torchrun(*words, options=["--max-restarts", 1])
    wait_for_metrics(run)
    os.kill(ranks_of(agent)[1], SIGKILL)
    out, err = agent.communicate(timeout=150)
    assert agent.returncode == 0, err
    assert "rank 1 died" in err
    assert "Traceback" not in err
    assert out.count("validation loss") == 1
    assert [path.name for path in run.parent.glob("laptop-*")] == ([] if with_out else ["laptop-1"])
    assert [row["step"] for row in read_metrics(run)[0]] == list(range(200))


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_requested_stop_has_one_status_on_all_ranks(restarts, words, torchrun, tmp_path):
    """With --max-restarts the status is 0: torchrun would start the ranks again otherwise."""
    agent = torchrun(*words, "--steps", 10**6, options=["--max-restarts", restarts])
    wait_for_metrics(tmp_path / "run")
    os.kill(ranks_of(agent)[1], SIGTERM)
    out, err = agent.communicate(timeout=150)
    assert "stopped; continue with" in out
    if restarts:
        assert agent.returncode == 0, err
        assert "ChildFailedError" not in err
    else:
        assert agent.returncode == 1
        assert len(re.findall(r"exitcode  : 143 ", err)) == 2, err


@pytest.mark.slow
def test_ranks_end_with_torchrun(words, torchrun, tmp_path):
    """Ranks without their torchrun would continue, and a second job would find the run locked."""
    agent = torchrun(*words, "--steps", 10**6, "--rank-timeout", TIMEOUT)
    wait_for_metrics(tmp_path / "run")
    ranks = ranks_of(agent)
    agent.kill()
    _, err = agent.communicate(timeout=150)  # ends when no rank has the pipe open
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert "tritium: lost the store of torchrun" in err
