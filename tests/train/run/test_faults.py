"""A run's folder and its data are damaged, moved, or made hostile: the commands say so in one line.

Each test runs the commands `tritium train`, `sample`, `export` in this process.
"""

import itertools
import os
import resource
import shutil
import signal

import pytest

from tritium.__main__ import dispatch
from tritium.train import loop, session
from tritium.train.data import loader, shards
from tritium.train.run.folder import create_free_folder
from tritium.train.run.metrics import read_metrics
from tritium.train.storage.files import seal, unseal

pytestmark = pytest.mark.plain


def weights(run, step=20) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "model.safetensors").read_bytes()


def names(folder) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def call_at(number: int, name: str, monkeypatch, action) -> None:
    """Call `action` before the call of this number of `name`, a function of session.py."""
    original = getattr(session, name)
    count = itertools.count(1)

    def counted(*args, **options):
        if next(count) == number:
            action()
        return original(*args, **options)

    monkeypatch.setattr(session, name, counted)


def kill_before_first_checkpoint(monkeypatch, words) -> None:
    """Run a command in a fork that ends by kill -9 when it would write its first checkpoint."""

    def die(config, run, *_):
        (run / "checkpoints" / ".step-0.tmp").mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save_first", die)
        pid = os.fork()
        if pid == 0:
            try:
                dispatch([str(word) for word in words])
            finally:
                os._exit(70)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_a_run_killed_before_its_first_checkpoint_goes_on(tiny, tritium, monkeypatch, tmp_path):
    """By the same command, and by --resume. Both end like a run that was not killed."""
    run = tmp_path / "run"
    kill_before_first_checkpoint(monkeypatch, tiny)
    assert names(run) == {"config.json", "tokenizer.json", "checkpoints", ".step-0.tmp", ".lock"}
    shutil.copytree(run, tmp_path / "second")
    status, _, err = tritium(*tiny)
    assert status == 0, err
    status, _, err = tritium("train", "--resume", tmp_path / "second")
    assert status == 0, err
    assert weights(run) == weights(tmp_path / "second")
    assert names(run) == names(tmp_path / "second")
    assert not names(run) & {".step-0.tmp", ".lock"}


def test_an_empty_config_of_a_full_disk_is_taken_over(tiny, tritium, error_of, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").touch()
    assert "start it again with the same command" in error_of("train", "--resume", run)
    assert tritium(*tiny)[0] == 0


def test_a_full_disk_at_the_first_file_leaves_no_folder(tiny, tritium, error_of, tmp_path):
    """A limit on the size of files makes a write fail in the middle, as a full disk does."""
    assert tritium(*tiny)[0] == 0  # builds the dataset
    run = tmp_path / "second"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        line = error_of(*tiny, "--out", run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line == f"tritium: {run / 'config.json'}: File too large"
    assert not run.exists()


def test_a_second_process_is_told_which_one_writes(tiny, tritium, monkeypatch, tmp_path):
    status = []

    def resume():
        status.append(tritium("train", "--resume", tmp_path / "run"))

    call_at(5, "learning_rate", monkeypatch, resume)
    assert tritium(*tiny)[0] == 0
    assert status[0][0] == 2
    assert f"no other process writes, but process {os.getpid()} on " in status[0][2]
    assert [row["step"] for row in read_metrics(tmp_path / "run")[0]] == list(range(20))


@pytest.mark.parametrize("action", ["move", "delete", "replace"])
def test_a_folder_that_is_gone_is_not_made_again(action, tiny, error_of, monkeypatch, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"

    def act():
        shutil.rmtree(run) if action == "delete" else run.rename(moved)
        if action == "replace":
            run.mkdir()

    call_at(15, "learning_rate", monkeypatch, act)
    assert f"{run}: expected the folder that this process writes, found" in error_of(*tiny)
    assert not run.exists() or not list(run.iterdir())
    assert action == "delete" or "step-10" in names(moved)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_file_that_was_deleted_while_training_is_named(
    name, tiny, error_of, monkeypatch, tmp_path
):
    file = tmp_path / "run" / name
    call_at(15, "learning_rate", monkeypatch, file.unlink)
    line = error_of(*tiny)
    assert f"{file}: expected the file that this process wrote, found none" in line
    assert line.endswith("put it back, then resume the run")


def test_another_tokenizer_in_a_run_is_noticed(tiny, tritium, error_of, tmp_path):
    assert tritium(*tiny)[0] == 0
    other = tmp_path / "other"
    assert tritium(*tiny, "--out", other, "--tokenizer", "chars")[0] == 0
    run = tmp_path / "run"
    shutil.copy(other / "tokenizer.json", run)
    words = {"sample": ["sample", run], "export": ["export", run, tmp_path / "out"]}
    words["chat"] = ["chat", run]
    for command in words.values():
        assert "run/tokenizer.json: expected tokenizer" in error_of(*command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("split", "change"), [("train", "cut"), ("val", "overwrite")])
def test_a_shard_that_changes_leaves_a_checkpoint_and_the_run_resumes(
    split, change, tiny, tritium, error_of, monkeypatch, tmp_path
):
    """The run then ends like one whose shards did not change."""
    monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(loader, "_BLOCK_TOKENS", 64)  # read one step at a time
    tiny = [*tiny, "--checkpoint-interval", 20]
    assert tritium(*tiny)[0] == 0
    run, broken = tmp_path / "run", tmp_path / "broken"
    (shard,) = (tmp_path / "home").rglob(f"{split}-*.bin")
    good = shard.read_bytes()

    def damage():
        with open(shard, "r+b") as file:
            if change == "cut":
                file.truncate(200)
            else:
                file.write(good[:128] + bytes(len(good) - 128))

    call_at(5, "learning_rate", monkeypatch, damage)
    message = "cut short while it was used" if change == "cut" else "changed while it was used"
    line = error_of(*tiny, "--out", broken)
    assert f"{shard}: {message}" in line
    assert line.endswith("copy it again, then resume the run")
    stopped = max(int(path.name[5:]) for path in (broken / "checkpoints").iterdir())
    assert 4 <= stopped <= 7 if split == "train" else stopped == 10
    assert [row["step"] for row in read_metrics(broken)[0]] == list(range(stopped))
    assert f"{shard}: " in error_of("train", "--resume", broken)
    shard.write_bytes(good)
    assert tritium("train", "--resume", broken)[0] == 0
    assert weights(run) == weights(broken)


def test_a_hostile_run_folder_is_one_line(tiny, tritium, error_of, monkeypatch, tmp_path):
    """Links, damaged lines and huge sizes. Nothing outside the folder is touched."""
    assert tritium(*tiny)[0] == 0
    run, secret = tmp_path / "run", tmp_path / "secret"
    secret.write_text("mine")

    # A finished run is resumed although other programs wrote into its text files.
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\n{"step": 1e999, "loss": 1}\n{"step": 3, "loss": [4]}\n')
    with open(run / "samples.txt", "ab") as file:
        file.write(b"\xff")
    status, _, err = tritium("train", "--resume", run)
    assert status == 0, err
    assert b"\xff" not in (run / "samples.txt").read_bytes()

    # links
    for name in ("samples.txt", "metrics.jsonl", "loss.png"):
        content = (run / name).read_bytes()
        (run / name).unlink()
        (run / name).symlink_to(secret)
        assert f"{name}: expected a file or folder of the run, got a link" in error_of(
            "train", "--resume", run
        )
        (run / name).unlink()
        (run / name).write_bytes(content)
    assert secret.read_text() == "mine"

    # sizes
    record = unseal((run / "config.json").read_bytes())
    for sizes in ({"n_layer": 10**9}, {"d_model": 2 * 10**9}):
        changed = record | {part: record[part] | sizes for part in ("train", "model")}
        (run / "config.json").write_bytes(seal(changed))
        for command in (("sample", run), ("train", "--resume", run)):
            assert "parameters in its configuration, got" in error_of(*command)


def test_default_folders_are_claimed_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = [create_free_folder("gpt2") for _ in range(3)]
    assert [str(path) for path in found] == ["runs/gpt2-1", "runs/gpt2-2", "runs/gpt2-3"]
    assert all(path.is_dir() for path in found)


def test_a_run_that_does_not_start_leaves_no_default_folder(tiny, error_of, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    at = tiny.index("--out")
    words = tiny[:at] + tiny[at + 2 :]
    assert "training tokens or more" in error_of(*words, "--context-tokens", "1000000")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert "training tokens or more" in error_of(*words, "--context-tokens", "1000000")
    assert names(tmp_path / "runs") == {"mine"}
