"""A save that is killed, or that fails, at each of its file operations.

After each: no named checkpoint is damaged, the run resumes bitwise, and no file is left over.
"""

import shutil
import signal
from pathlib import Path

import pytest

from tritium.train.run.checkpoint import checkpoints

pytestmark = pytest.mark.plain

STEPS, INTERVAL = 15, 5
# The operations of the save after 10 steps. It deletes the checkpoint of step 0.
FILE = ["open", "write", "write", "fsync"]
STATE = ["open", "write", "fsync"]
DELETE = ["rename", "unlink", "unlink", "unlink", "rmdir"]
OPERATIONS = ["mkdir", *FILE, *FILE, *STATE, "fsync", "rename", "fsync", *DELETE]
RENAME = OPERATIONS.index("rename") + 1
QUICK = (RENAME,)
# The save before the first step also creates the folder of the checkpoints.
FIRST_OPERATIONS = ["mkdir", "fsync", *OPERATIONS[: -len(DELETE)]]


def numbers(count, quick):
    """Parameters 1 to `count`. Only those in `quick` are part of the short run."""
    return [
        pytest.param(number, marks=() if number in quick else pytest.mark.slow)
        for number in range(1, count + 1)
    ]


@pytest.fixture(scope="module")
def execute(processes, tmp_path_factory):
    """Run a command: execute(words, number, ...) -> (status, output). `number` is what breaks."""
    folder = tmp_path_factory.mktemp("process")

    def call(words, number=0, *, step=10, kill=True) -> tuple[int, str]:
        log = folder / "operations"
        log.unlink(missing_ok=True)
        process = processes.start(
            words,
            folder,
            f"import os\nos.environ['TRITIUM_HOME'] = {str(folder / 'home')!r}\n"
            "import file_operations\n"
            f"file_operations.break_at({number}, step={step}, log={str(log)!r}, kill={kill})",
        )
        status = process.wait(100)  # other tests may use the disk
        call.operations = log.read_text().split() if log.exists() else []
        return status, process.output

    return call


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """Words of a run of 15 steps, without its folder."""
    text = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    text.write_text("the quick brown fox jumps over a lazy dog\n" * 300)
    return [
        *("train", "laptop", "--data", text, "--tokenizer", "bytes", "--device", "cpu"),
        *("--n-layer", 1, "--n-head", 2, "--d-model", 16, "--context-tokens", 16),
        *("--steps", STEPS, "--batch-size", 2, "--sample-tokens", 2, "--eval-interval", 1000),
        *("--checkpoint-interval", INTERVAL),
    ]


@pytest.fixture(scope="module")
def expected(execute, command, tmp_path_factory) -> dict[int, dict[str, bytes]]:
    """The checkpoints of a run that nothing broke, by step and file."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert execute([*command, "--out", run, "--keep-checkpoints", 9])[0] == 0
    return contents(run)


@pytest.fixture(scope="module")
def stopped(execute, command, tmp_path_factory) -> Path:
    """A run that was killed when its save after 10 steps began. It has the steps 0 and 5."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert execute([*command, "--out", run], 1)[0] == -signal.SIGKILL
    return run


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def contents(run: Path) -> dict[int, dict[str, bytes]]:
    """The content of each checkpoint that has the name of one."""
    return {
        step: {file.name: file.read_bytes() for file in folder.iterdir()}
        for step, folder in checkpoints(run).items()
    }


def check_no_checkpoint_is_damaged(run, expected) -> None:
    for step, files in contents(run).items():
        assert files == expected[step], step


def check_run_is_complete(run, expected) -> None:
    """The last checkpoint is as expected, and only the newest two are there, and no other files."""
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-10", "step-15"}
    check_no_checkpoint_is_damaged(run, expected)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_the_operations_of_a_save_are_known(execute, run, expected):
    assert execute(["train", "--resume", run])[0] == 0
    assert execute.operations == OPERATIONS
    check_run_is_complete(run, expected)


@pytest.mark.parametrize("number", numbers(len(OPERATIONS), QUICK))
def test_a_run_killed_in_a_save_loses_at_most_the_interval(
    number, execute, run, expected, record_property
):
    assert execute(["train", "--resume", run], number)[0] == -signal.SIGKILL
    check_no_checkpoint_is_damaged(run, expected)
    assert max(contents(run)) == (10 if number > RENAME else 10 - INTERVAL)
    record_property("faults", 1)
    record_property("steps_lost", 10 - max(contents(run)))
    status, output = execute(["train", "--resume", run])
    assert status == 0, output
    check_run_is_complete(run, expected)
    record_property("recovered", 1)


@pytest.mark.parametrize("number", numbers(len(FIRST_OPERATIONS), quick=()))
def test_a_run_killed_in_its_first_save_starts_again(
    number, execute, command, expected, tmp_path, record_property
):
    """By the same command, as a supervisor gives it."""
    run = tmp_path / "run"
    words = [*command, "--out", run, "--resume", "auto"]
    assert execute(words, number, step=0)[0] == -signal.SIGKILL
    if number == 1:
        assert execute.operations == ["mkdir"]
    check_no_checkpoint_is_damaged(run, expected)
    record_property("faults", 1)
    status, output = execute(words, step=0)
    assert status == 0, output
    check_run_is_complete(run, expected)
    record_property("recovered", 1)


@pytest.mark.parametrize("number", numbers(RENAME, quick=(7,)))
def test_a_full_disk_is_one_line_and_older_checkpoints_stay(
    number, execute, run, expected, record_property
):
    """The line names the file. After that the run resumes."""
    before = contents(run)
    status, output = execute(["train", "--resume", run], number, kill=False)
    assert status == 2
    lines = [line for line in output.splitlines() if line.startswith("tritium:")]
    assert len(lines) == 1, output
    assert "checkpoint after step 10 was not written" in lines[0]
    assert lines[0].endswith("No space left on device")
    assert "Traceback" not in output
    if OPERATIONS[number - 1] in ("open", "write"):
        assert f"{run}/checkpoints/step-10/" in lines[0]
    assert contents(run) == before
    assert len(list((run / "checkpoints").iterdir())) == len(before)
    assert execute(["train", "--resume", run])[0] == 0
    check_run_is_complete(run, expected)
    record_property("faults", 1)
    record_property("recovered", 1)
