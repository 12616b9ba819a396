import json
import os
import shutil
from pathlib import Path

import pytest

from tritium.errors import InputError
from tritium.model.folder import check_new_folder
from tritium.train.config import TrainConfig
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.distributed.world import SINGLE_PROCESS
from tritium.train.run.folder import (
    check_folder_unused,
    claim_folder,
    only_writer,
    open_recorded_dataset,
    read_run,
)
from tritium.train.run.metrics import read_metrics
from tritium.train.storage import lock
from tritium.train.storage.files import seal

pytestmark = pytest.mark.plain

CONFIG = TrainConfig.from_options(steps=7, n_layer=2, data=("a.txt", "b.txt"))
# A run of version 0.1.0, stopped after 5 of 10 steps, its dataset and its text.
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run-0.1.0"
OLD_DATASET_NAME = "corpus-bytes-facb460c47f5ffd6"


@pytest.fixture
def dataset(corpus, tmp_path):
    build(tmp_path / "dataset", [corpus], "bytes", progress=False)
    return open_dataset(tmp_path / "dataset")


@pytest.fixture
def run(tmp_path, dataset) -> Path:
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    claim_folder(folder, CONFIG, CONFIG.gpt(257), dataset, {"device": "cpu"})
    return folder


def change(run: Path, **changes) -> None:
    """Change fields of config.json. None deletes a field; a dictionary changes entries of it."""
    record = json.loads((run / "config.json").read_text())
    record.pop("sha256", None)
    for key, value in changes.items():
        if isinstance(value, dict):
            record[key] |= value
        elif value is None:
            del record[key]
        else:
            record[key] = value
    (run / "config.json").write_bytes(seal(record))


# --- config.json


def test_a_record_is_read_as_it_was_written(run, dataset):
    record = read_run(run)
    assert record.train == CONFIG
    assert record.model == CONFIG.gpt(257)
    assert record.execution == {"device": "cpu"}
    assert record.dataset == dataset.path.resolve()
    assert record.dataset_relative == "../../dataset"
    assert record.tokens == {"train": len(dataset.train), "val": len(dataset.val)}
    assert record.tokenizer_sha256 == dataset.tokenizer.sha256


def test_a_folder_in_use_raises(run, dataset, tmp_path):
    (run / "checkpoints" / "step-0").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is a run already; choose another `out`, or `resume` it"):
        claim_folder(run, CONFIG, CONFIG.gpt(257), dataset)
    (tmp_path / "other").mkdir()
    check_folder_unused(tmp_path / "other")
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="this one holds other files"):
        check_folder_unused(tmp_path / "other")


def test_a_folder_whose_path_is_not_utf8_raises(tmp_path):
    for check in (check_folder_unused, check_new_folder):
        with pytest.raises(InputError, match=r"/k\?: expected a path in UTF-8"):
            check(tmp_path / "k\udcef")


@pytest.mark.parametrize("name", ["text", "text/run"])
def test_a_folder_at_or_below_a_file_raises(name, tmp_path):
    (tmp_path / "text").write_text("x")
    with pytest.raises(InputError, match=r"expected a folder, got the file .*text; choose another"):
        check_folder_unused(tmp_path / name)


def test_a_folder_that_cannot_be_written_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match=r"got .* without the right to write; choose another"):
        check_folder_unused(tmp_path / "new" / "run")


def test_a_folder_that_is_not_a_run_raises(tmp_path):
    with pytest.raises(InputError, match="expected the folder of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b"\xff\xfe", b'{"train": {}}', b'{"train": 3}', b"[" * 100_000],
)
def test_damaged_configurations_raise(run, content):
    (run / "config.json").write_bytes(content)
    with pytest.raises(
        InputError,
        match=r"config\.json: expected what `tritium train` wrote there, got something else",
    ):
        read_run(run)


def test_missing_options_take_their_defaults(run):
    record = json.loads((run / "config.json").read_text())
    for name in ("steps", "precision", "n_head", "tensorboard"):
        del record["train"][name]
    del record["model"]["norm"], record["dataset_relative"], record["tokens"], record["sha256"]
    (run / "config.json").write_text(json.dumps(record))
    found = read_run(run)
    assert found.train == CONFIG.with_options(steps=TrainConfig().steps)
    assert found.model == CONFIG.gpt(257)
    assert found.tokens is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"stepz": 7}}, "unknown option 'stepz'; did you mean 'steps'"),
        ({"model": {"n_heads": 7}}, "unknown model option 'n_heads'; did you mean 'n_head'"),
        ({"datasets": "x"}, "unknown field 'datasets'; did you mean 'dataset'"),
        ({"train": {"steps": "x"}}, "steps: expected int, got 'x'"),
        ({"train": {"steps": 2.0}}, "steps: expected int, got 2.0"),
        ({"train": {"data": "abc"}}, r"data: expected tuple\[str, ...\], got 'abc'"),
        ({"train": {"precision": "int3"}}, "precision: expected .*'bfloat16'.*, got 'int3'"),
        ({"train": {"lr": True}}, "lr: expected float, got True"),
        ({"train": {"task": "instruct", "packing": "x"}}, "packing: expected bool, got 'x'"),
        ({"tokens": {"val": [7]}}, r"tokens: expected dict\[str, int\] . None, got"),
        ({"format_version": 2}, "expected format_version 1, got 2; use the version of tritium"),
        ({"train": {"steps": 0}}, "steps: expected 1 or more"),
        ({"model": {"n_head": 7}}, "expected what `tritium train` wrote"),
        ({"model": {"context_tokens": 7}}, "context_tokens: expected 256 as in `train`, got 7"),
        ({"dataset": None}, "expected what `tritium train` wrote"),
    ],
)
def test_unknown_names_and_bad_values_raise(run, changes, message):
    change(run, **changes)
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        read_run(run)


def test_an_edited_config_raises_and_says_what_to_do(run):
    file = run / "config.json"
    file.write_bytes(file.read_bytes().replace(b'"lr": 0.001', b'"lr": 0.002'))
    with pytest.raises(InputError, match=r"json: it does not match its checksum: .*undo the chan"):
        read_run(run)


def test_a_folder_without_a_checkpoint_is_taken_over(run, dataset):
    (run / "checkpoints" / ".step-0.tmp").mkdir(parents=True)
    (run / ".tokenizer.json.17.tmp").touch()
    claim_folder(run, CONFIG.with_options(steps=9), CONFIG.gpt(257), dataset)
    assert read_run(run).train.steps == 9
    (run / "config.json").write_bytes(b"")  # an older version, on a full disk
    with pytest.raises(InputError, match=r"got an empty file: .*start it again with the same comm"):
        read_run(run)
    claim_folder(run, CONFIG, CONFIG.gpt(257), dataset)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "gpt2"}'),  # another program wrote it
        ("metrics.jsonl", ""),
        ("checkpoints/notes.txt", ""),
    ],
)
def test_a_folder_with_other_files_is_not_taken_over(name, content, run, dataset):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    with pytest.raises(InputError, match="expected a new or empty folder"):
        claim_folder(run, CONFIG, CONFIG.gpt(257), dataset)


# --- the writer of a run


def test_a_run_has_one_writer_at_a_time(run):
    with only_writer(run, SINGLE_PROCESS):
        with (
            pytest.raises(
                InputError, match=rf"run: .*, but process {os.getpid()} on .* has been wr"
            ),
            only_writer(run, SINGLE_PROCESS),
        ):
            pass
        assert (run / ".lock").exists()
    assert not (run / ".lock").exists()
    with only_writer(run, SINGLE_PROCESS):
        pass


def test_a_system_without_locks_prints_a_warning(run, monkeypatch, capsys):
    monkeypatch.setattr(lock, "fcntl", None)
    (run / "metrics.jsonl").touch()
    with only_writer(run, SINGLE_PROCESS) as check_folder:
        check_folder()
    assert "this system has no locks, so it is not locked" in capsys.readouterr().err


def test_a_writer_deletes_temporary_files_of_killed_processes(run):
    (run / ".metrics.jsonl.17.tmp").touch()
    (run / "notes.tmp").touch()  # The user made this file.
    before = {path.name for path in run.iterdir()} - {".metrics.jsonl.17.tmp"}
    with only_writer(run, SINGLE_PROCESS):
        pass
    assert {path.name for path in run.iterdir()} == before


@pytest.mark.parametrize("replaced", [False, True])
def test_a_moved_folder_is_noticed(replaced, run):
    moved = run.with_name("moved")
    (run / "metrics.jsonl").touch()
    with only_writer(run, SINGLE_PROCESS) as check_folder:
        check_folder()
        run.rename(moved)
        if replaced:
            run.mkdir()
            (run / ".lock").touch()
        with pytest.raises(InputError, match=r"found (none|another folder): it was moved or del"):
            check_folder()
    assert not (moved / ".lock").exists()
    assert not replaced or (run / ".lock").exists()


def test_a_link_or_a_pipe_in_a_folder_raises(run, tmp_path):
    os.mkfifo(run / "metrics.jsonl")
    with (
        pytest.raises(InputError, match=r"metrics\.jsonl: expected .*, got a device or a pipe"),
        only_writer(run, SINGLE_PROCESS),
    ):
        pass
    (run / "metrics.jsonl").unlink()
    for name in ("samples.txt", "metrics.jsonl", "checkpoints", "profile"):
        (run / name).symlink_to(tmp_path / "elsewhere")
        with (
            pytest.raises(InputError, match=rf"{name}: expected a file or folder .*, got a link"),
            only_writer(run, SINGLE_PROCESS),
        ):
            pass
        (run / name).unlink()


# --- the dataset of a run


def test_a_dataset_is_found_after_run_and_dataset_moved_together(run, dataset, tmp_path):
    (tmp_path / "moved").mkdir()
    for folder in (run.parent, dataset.path):
        shutil.move(folder, tmp_path / "moved" / folder.name)
    moved = tmp_path / "moved" / "runs" / "run"
    found = open_recorded_dataset(read_run(moved), moved)
    assert found.path.resolve() == tmp_path / "moved" / "dataset"


def test_a_dataset_is_found_next_to_the_run(run, dataset):
    shutil.move(dataset.path, run.parent / "dataset")
    assert open_recorded_dataset(read_run(run), run).path == run.parent / "dataset"


def test_a_dataset_that_cannot_be_built_again_raises(run, dataset):
    shutil.rmtree(dataset.path)
    with pytest.raises(
        InputError, match=r"expected the dataset of .*, found none, and it cannot .*a\.txt"
    ):
        open_recorded_dataset(read_run(run), run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "0" * 64}, "expected tokenizer 000000000000, with which"),
        ({"tokens": {"train": 5}}, "expected 5 training and .* validation tokens as .*, got"),
    ],
)
def test_another_dataset_raises(run, changes, message):
    change(run, **changes)
    with pytest.raises(InputError, match=message):
        open_recorded_dataset(read_run(run), run)


@pytest.mark.parametrize(
    ("tokenizer", "added", "message"),
    [
        ("bytes", "", None),
        ("bytes", "more text", "expected .* training and .* validation tokens as .*, got"),
        ("chars", "", "expected tokenizer .*, with which"),
    ],
)
def test_a_dataset_built_again_must_equal_the_recorded_one(
    tokenizer, added, message, run, dataset, corpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    shutil.rmtree(dataset.path)
    corpus.write_text(corpus.read_text() + added)
    change(run, train={"data": [str(corpus)], "tokenizer": tokenizer})
    if message is None:
        found = open_recorded_dataset(read_run(run), run, progress=False)
        assert found.tokenizer.sha256 == dataset.tokenizer.sha256
        return
    with pytest.raises(InputError, match=message):
        open_recorded_dataset(read_run(run), run, progress=False)


@pytest.mark.parametrize("found", ["next to the run", "built again"])
def test_a_run_of_an_older_version_resumes(found, tmp_path, tritium, monkeypatch):
    """Its dataset was moved or deleted. The loss matches the loss of the older version."""
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    run = tmp_path / "moved" / "run"
    shutil.copytree(OLD_RUN / "run", run)
    change(run, dataset=str(tmp_path / "deleted" / OLD_DATASET_NAME))
    if found == "next to the run":
        shutil.copytree(OLD_RUN / "dataset", run.parent / OLD_DATASET_NAME)
    else:
        shutil.copy(OLD_RUN / "corpus.txt", tmp_path)
        monkeypatch.chdir(tmp_path)
    status, _, err = tritium("train", "--resume", run)
    assert status == 0, err
    assert ("building the dataset" in err) is (found == "built again")
    rows, evaluations = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(10))
    assert evaluations[-1]["step"] == 10
    assert evaluations[-1]["val_loss"] == pytest.approx(5.1793, abs=1e-3)
