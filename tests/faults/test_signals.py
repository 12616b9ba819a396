"""Signals in each phase of a run, from another process. Broken pipes. Time limits."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.plain

INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
# Phase -> hook. A blocked function sleeps for a minute unless a signal ends it.
BEFORE_THE_FIRST_STEP = {
    "import": "import json\nblock(json, 'dumps')\njson.dumps(0)",
    "dataset": "block(pretrain, '_prepare_dataset')",
    "model": "block(loop, 'initial_model')",
}
DURING_STEPS = {
    "first step": "block(trainer, 'batch_loss')",
    "step": "block(trainer, 'batch_loss', calls=8)",
    "update": "block(trainer.Trainer, 'update', seconds=0.5, calls=8)",
    "evaluation": "block(evaluate, 'batch_loss')",
    "sample": "block(pretrain, 'sample_text')",
    "checkpoint": "block(torch, 'get_rng_state', seconds=0.5, calls=2)",
    "last sample": "block(pretrain, 'sample_text', calls=2)",
}
QUICK = ("step", "sample", "checkpoint")
SIGNALS = (TERM, HUP, TERM, INT, USR1, INT, TERM)


@pytest.fixture
def stop(begin, words, tmp_path, record_property):
    """Start a run, send it signals when it reaches a phase, and wait for its end."""

    def call(hook: str, *numbers: int, more=()) -> tuple[int, str]:
        process = begin([*words, "--out", tmp_path / "run", *more], hook)
        process.wait_for_phase()
        sent = time.monotonic()
        for number in numbers[:1]:
            process.send(number)
            time.sleep(0.1)  # signals that arrive together have no order
        for number in numbers[1:]:
            process.send(number)
        # 10 s, or longer on a machine that is busy with other programs.
        status = process.wait(10 * max(1, os.getloadavg()[0] / os.cpu_count()))
        assert status is not None, f"it had to be killed: {process.output}"
        if numbers:
            record_property("faults", len(numbers))
            record_property("seconds_to_stop", time.monotonic() - sent)
        assert "Traceback" not in process.output, process.output
        return status, process.output

    return call


@pytest.fixture
def check_resume(begin, words, tmp_path, record_property):
    """Check that the resumed run ends with the weights of a run that nobody stopped."""

    def call() -> None:
        run, unbroken = tmp_path / "run", tmp_path / "unbroken"
        for command in (["train", "--resume", run], [*words, "--out", unbroken]):
            process = begin(command)
            assert process.wait() == 0, process.output
        for name in ("model.safetensors", "optimizer.safetensors"):
            file = Path("checkpoints", "step-20", name)
            assert (run / file).read_bytes() == (unbroken / file).read_bytes()
        samples = (run / "samples.txt").read_text()
        assert re.findall(r"--- step (\d+)", samples) == ["10", "20"]
        assert samples == (unbroken / "samples.txt").read_text()
        record_property("recovered", 1)

    return call


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("phase", "number"), [*zip(BEFORE_THE_FIRST_STEP, (INT, TERM, USR1), strict=True)]
)
def test_a_signal_before_the_first_step_ends_the_run_with_one_line(phase, number, stop, tmp_path):
    status, output = stop(BEFORE_THE_FIRST_STEP[phase], number, INT, TERM)
    assert status == 128 + number
    assert output.count("stopped") == 1, output
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        pytest.param(phase, number, marks=() if phase in QUICK else pytest.mark.slow)
        for phase, number in zip(DURING_STEPS, SIGNALS, strict=True)
    ],
)
def test_a_storm_of_signals_leaves_a_whole_checkpoint(phase, number, stop, tmp_path):
    status, output = stop(DURING_STEPS[phase], number, *[INT, TERM, HUP, USR1] * 20)
    assert status == 128 + number
    assert output.count("a checkpoint will be written") == 1
    assert f"train --resume {tmp_path / 'run'}" in output
    expected = {"first step": 0, "step": 7, "update": 8, "last sample": 20}.get(phase, 10)
    assert checkpoints(tmp_path / "run")[-1] == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [INT, TERM, HUP, USR1])
@pytest.mark.parametrize("phase", DURING_STEPS)
def test_every_signal_in_every_phase_resumes_bitwise(phase, number, stop, check_resume):
    assert stop(DURING_STEPS[phase], number)[0] == 128 + number
    check_resume()


@pytest.mark.slow
def test_a_signal_ends_a_compilation(stop, tmp_path):
    """Inside of Inductor, which catches exceptions."""
    hook = "from torch._inductor import graph\nblock(graph.GraphLowering, 'run')"
    status, output = stop(hook, TERM, more=["--compile", "on"])
    assert status == 143
    assert "train --resume" in output
    assert checkpoints(tmp_path / "run") == [0]


BROKEN_PIPE = "read, write = os.pipe()\nos.close(read)\n" + "".join(
    f"os.dup2(write, {number})\n" for number in (1, 2)
)


def test_a_stop_without_a_reader_of_the_output_writes_a_checkpoint(stop, tmp_path):
    """As after Ctrl-C of `tritium train ... 2>&1 | tee log`."""
    assert stop(BROKEN_PIPE + DURING_STEPS["step"], INT)[0] == 130
    assert checkpoints(tmp_path / "run")[-1] == 7


@pytest.mark.slow
def test_a_run_without_a_reader_of_its_output_ends_with_status_0(begin, words, tmp_path):
    assert begin([*words, "--out", tmp_path / "run"], BROKEN_PIPE).wait() == 0
    assert checkpoints(tmp_path / "run")[-1] == 20


@pytest.mark.slow
def test_ignored_signals_stay_ignored(begin, words, tmp_path):
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    hook = ignore + "block(trainer, 'batch_loss', seconds=0.3, calls=8)"
    process = begin([*words, "--out", tmp_path / "run"], hook)
    process.wait_for_phase()
    process.send(HUP)
    assert process.wait() == 0, process.output


def test_max_minutes_stops_a_run_with_a_checkpoint(stop, tmp_path):
    """The limit begins in the blocked step: nobody knows how long a process takes to it."""
    late = """
import time
limit, sleep, given = loop.set_time_limit, time.sleep, []
loop.set_time_limit = given.append
time.sleep = lambda seconds: (given and limit(given.pop() / 360_000), sleep(seconds))
"""
    status, output = stop(DURING_STEPS["step"] + late, more=["--max-minutes", "600"])
    assert status == 0
    assert "train --resume" in output
    assert checkpoints(tmp_path / "run")[-1] == 7


def test_stop_status_is_the_status_of_a_stop(stop):
    assert stop(DURING_STEPS["step"], USR1, more=["--stop-status", "75"])[0] == 75


def test_ctrl_c_while_torch_is_imported_prints_one_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tritium", "train", "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(INT, signal.default_int_handler),
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, INT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "tritium: stopped by SIGINT\n"
