"""Damaged files, full disks, and two processes on one run.

A command then recovers, or it ends with one line that names the file. Nothing outside the folder of
the run is touched. When the file is good again, the run ends with the weights of an unbroken run.
"""

import shutil
import signal
import time
from pathlib import Path

import pytest

from tritium.train.run.checkpoint import checkpoints

pytestmark = pytest.mark.plain

STEPS = 20
# Ends the process without a word in step 13.
KILL = """
update = trainer.Trainer.update
steps = []

def killed(self, lr):
    steps.append(lr)
    if len(steps) == 13:
        os.kill(os.getpid(), 9)
    return update(self, lr)

trainer.Trainer.update = killed
"""
STEP = "checkpoints/step-10"
RUN_FILES = (
    *("config.json", "tokenizer.json", "metrics.jsonl", "samples.txt"),
    *(f"{STEP}/{name}" for name in ("state.json", "model.safetensors", "optimizer.safetensors")),
)
DATA_FILES = ("dataset.json", "tokenizer.json", "train-00000.bin", "val-00000.bin")
CHANGES = ("flipped", "cut", "empty", "deleted", "nested", "a link")
QUICK = (("flipped", "config.json"), ("cut", f"{STEP}/model.safetensors"))


def cases(files, quick=()):
    return [
        pytest.param(change, file, marks=() if (change, file) in quick else pytest.mark.slow)
        for file in files
        for change in CHANGES
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder for the runs of this file. Their dataset is in ROOT/home."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "corpus.txt").write_text("the quick brown fox jumps over a lazy dog\n" * 300)
    (folder / "secret").write_text("mine")
    return folder


@pytest.fixture(scope="module")
def execute(processes, root):
    """Run a command: execute(words, hook) -> (status, output)."""

    def call(words, hook="") -> tuple[int, str]:
        start = "from tritium.train import trainer\nfrom tritium.train.run import metrics\n"
        start += "from tritium.train.storage import files\n"
        start += f"import os\nos.environ['TRITIUM_HOME'] = {str(root / 'home')!r}\n"
        process = processes.start(words, root / "process", start + hook)
        status = process.wait()
        assert "Traceback" not in process.output, process.output
        return status, process.output

    return call


@pytest.fixture(scope="module")
def command(root) -> list:
    """Words of a run of 20 steps, without its folder."""
    return [
        *("train", "laptop", "--data", root / "corpus.txt", "--tokenizer", "bytes"),
        *("--device", "cpu", "--n-layer", 1, "--n-head", 2, "--d-model", 16),
        *("--context-tokens", 16, "--steps", STEPS, "--batch-size", 2, "--sample-tokens", 2),
        *("--eval-interval", 5, "--eval-tokens", 32, "--checkpoint-interval", 5),
        "--no-background-checkpoints",
    ]


@pytest.fixture(scope="module")
def killed(execute, command, root) -> Path:
    """A run that was killed in step 13. It has checkpoints of 5 and 10 steps."""
    assert execute([*command, "--out", root / "killed"], KILL)[0] == -signal.SIGKILL
    assert list(checkpoints(root / "killed")) == [5, 10]
    return root / "killed"


@pytest.fixture(scope="module")
def expected(execute, command, root, killed) -> list[bytes]:
    """The last weights and optimizer state of an unbroken run."""
    assert execute([*command, "--out", root / "unbroken"])[0] == 0
    return last_tensors(root / "unbroken")


@pytest.fixture
def run(killed, tmp_path) -> Path:
    return shutil.copytree(killed, tmp_path / "run")


def last_tensors(run: Path) -> list[bytes]:
    folder = run / "checkpoints" / f"step-{STEPS}"
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def damage(file: Path, change: str, secret: Path) -> None:
    good = file.read_bytes()
    file.unlink()
    if change == "flipped":
        middle = len(good) // 2
        file.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    elif change == "cut":
        file.write_bytes(good[: len(good) // 2])
    elif change == "empty":
        file.touch()
    elif change == "nested":
        file.write_bytes(b'{"train": ' + b"[" * 100_000)
    elif change == "a link":
        file.symlink_to(secret)


def check_recovery(execute, file, change, run, expected, root, record_property) -> None:
    """Damage a file, and resume the run before and after the file is good again."""
    good = file.read_bytes()
    damage(file, change, root / "secret")
    try:
        status, output = execute(["train", "--resume", run])
    finally:
        if file.parent.is_dir():
            file.unlink(missing_ok=True)
    assert (root / "secret").read_text() == "mine"
    lines = [line for line in output.splitlines() if line.startswith("tritium: ")]
    record_property("faults", 1)
    if status == 0:
        assert len(lines) <= 1, output
    else:
        assert status == 2, output
        assert len(lines) == 1, output
        assert file.name in lines[0] or str(file.parent) in lines[0]
        file.write_bytes(good)
        status, output = execute(["train", "--resume", run])
        assert status == 0, output
    assert last_tensors(run) == expected
    record_property("recovered", 1)


@pytest.mark.parametrize(("change", "name"), cases(RUN_FILES, QUICK))
def test_a_damaged_file_of_a_run_is_named_or_replaced(
    change, name, execute, run, expected, root, record_property
):
    check_recovery(execute, run / name, change, run, expected, root, record_property)


@pytest.mark.parametrize(("change", "name"), cases(DATA_FILES))
def test_a_damaged_file_of_a_dataset_is_named_or_replaced(
    change, name, execute, run, expected, root, record_property
):
    (file,) = (root / "home" / "datasets").glob(f"*/{name}")
    good = file.read_bytes()
    try:
        check_recovery(execute, file, change, run, expected, root, record_property)
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(good)


# A write to one file fails after half of the bytes, as on a full disk.
FULL = """
import errno, io
name, number = {name!r}, {number}
found = []

def fail(path, piece):
    if name in str(path):
        found.append(path)
        if len(found) == number:
            return piece[: len(piece) // 2]

write_flushed = files.write_flushed

def flushed(path, pieces):
    pieces = [bytes(piece) for piece in pieces]
    half = fail(path, b"".join(pieces))
    if half is not None:
        write_flushed(path, [half])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    write_flushed(path, pieces)

class Full(io.TextIOWrapper):
    def write(self, text):
        half = fail(self.name, text)
        if half is not None:
            super().write(half)
            self.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)

files.write_flushed = flushed
metrics.open = lambda path, mode, encoding: Full(open(path, mode + "b"), encoding=encoding)
"""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, number, marks=() if number == 9 else pytest.mark.slow)
        for name, count in (("config.json", 1), ("tokenizer.json", 1), ("samples.txt", 3),
                            ("metrics.jsonl", 30))
        for number in range(1, count + 1)
    ],
)  # fmt: skip
def test_a_full_disk_is_one_line_that_names_the_file(
    name, number, execute, command, expected, tmp_path, record_property
):
    words = [*command, "--out", tmp_path / "run", "--resume", "auto"]
    status, output = execute(words, FULL.format(name=name, number=number))
    lines = [line for line in output.splitlines() if line.startswith("tritium: ")]
    assert status == 2, output
    assert len(lines) == 1, output
    assert lines[0].endswith(f"{name}: No space left on device")
    record_property("faults", 1)
    status, output = execute(words)
    assert status == 0, output
    assert last_tensors(tmp_path / "run") == expected
    assert not list(tmp_path.rglob("*.tmp"))
    record_property("recovered", 1)


@pytest.mark.slow
def test_a_full_disk_while_a_dataset_is_built_is_one_line(execute, command, root, record_property):
    for number, name in enumerate(("train-00000.bin", "val-00000.bin", "dataset.json")):
        words = [*command, "--out", root / f"built-{number}", "--held-out", 0.2 + number / 10]
        status, output = execute(words, FULL.format(name=name, number=1))
        assert status == 2, output
        assert f"{name}: No space left on device" in output
        assert execute(words)[0] == 0
        assert not list((root / "home").rglob("*.tmp"))
    record_property("faults", 3)


def test_the_second_process_on_a_run_is_told_which_one_writes(
    begin, words, tmp_path, record_property
):
    run = tmp_path / "run"
    first = begin([*words, "--out", run], "block(trainer, 'batch_loss', calls=8)", "first")
    first.wait_for_phase()
    for command in (["train", "--resume", run], [*words, "--out", run, "--resume", "auto"]):
        second = begin(command, name="second")
        assert second.wait() == 2
        assert f"no other process writes, but process {first.pid} on " in second.output
    first.send(signal.SIGKILL)
    first.wait()
    second = begin(["train", "--resume", run], name="second")
    assert second.wait() == 0, second.output
    record_property("faults", 2)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the folder", "config.json", "metrics.jsonl", ".lock"])
def test_a_folder_deleted_while_training_is_one_line(what, begin, words, tmp_path, record_property):
    """The lock is made again: nobody else has it."""
    run = tmp_path / "run"
    hook = "block(trainer, 'batch_loss', seconds=1, calls=8)"
    process = begin([*words, "--out", run], hook)
    process.wait_for_phase()
    time.sleep(0.1)
    if what == "the folder":
        shutil.rmtree(run)
    else:
        (run / what).unlink()
    status = process.wait()
    record_property("faults", 1)
    if what == ".lock":
        assert status == 0, process.output
        return
    assert status == 2, process.output
    lines = [line for line in process.output.splitlines() if line.startswith("tritium: ")]
    assert len(lines) == 1, process.output
    assert "deleted in the meantime" in lines[0]
    assert run.exists() == (what != "the folder")
