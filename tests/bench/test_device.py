"""bench/device.sh: rehearsals on the CPU, deadlines, results of stopped commands, bad arguments."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
import tyro

from tritium.__main__ import dispatch
from tritium.bench import device
from tritium.bench._device_parts import COMMANDS, KERNEL_SHAPES, TOTAL_SECONDS, TUNED, Part
from tritium.bench.ops import OPERATORS
from tritium.bench.ops.compare import shapes_of
from tritium.bench.ops.tune import VARIANTS
from tritium.bench.record import read_record, write_record
from tritium.bench.report import report
from tritium.bench.training import training
from tritium.train.commands.cli import run

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "device.sh"
USAGE = "usage: bench/device.sh short|correct|train|models|kernels|tune|later OUT_DIR"
# The records that each command writes.
KINDS = {
    "short": {"layer_norm.json": "tune"},
    "correct": {"machine.json": "machine", "runs": "runs"},
    "train": {"train.json": "train", "profile.json": "predict"},
    "models": {"shakespeare.json": "train"},
    "kernels": {"layer_norm/kernels.json": "kernels"},
    "tune": {"layer_norm.json": "tune"},
    "later": {},
}


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Run the parts in this process: each start of Python takes seconds. pytest does not run."""

    one_at_a_time = threading.Lock()  # standard output is redirected for all threads

    def wait(command, log, seconds, save):
        assert command[:2] == [sys.executable, "-m"]
        with one_at_a_time, log.open("w") as output, contextlib.redirect_stdout(output):
            if command[2] == "pytest":
                print(shlex.join(command), "\n2 passed")
                return 0
            assert command[2] == "tritium"
            return run(dispatch, command[3:])

    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(device, "_wait", wait)


@pytest.mark.parametrize(
    "command",
    [
        name if name in ("correct", "short") else pytest.param(name, marks=pytest.mark.slow)
        for name in COMMANDS
    ],
)
def test_each_command_rehearses_and_leaves_a_json_and_a_tar(command, in_process, tmp_path, capsys):
    assert device.run_command(command, tmp_path, rehearse=True) == 0, capsys.readouterr().out
    record = read_record(tmp_path / f"{command}.json", "device")
    assert record["is_rehearsal"]
    assert {part["status"] for part in record["parts"]} == {"done"}
    found = {path: kind["kind"] for path, kind in record["records"].items()}
    assert KINDS[command].items() <= found.items()
    with tarfile.open(tmp_path / f"{command}.tar.gz") as tar:
        names = set(tar.getnames())
    assert {f"{command}/{part['name']}.log" for part in record["parts"]} <= names
    (tmp_path / command).rename(tmp_path.parent / f"parts-{command}")
    text = report(tmp_path)
    assert f"`bench/device.sh {command}`" in text
    if command == "kernels":
        assert "| `layer_norm` | M=8 N=64 |" in text
    if command == "correct":
        assert "Weights after two equal steps of shakespeare-char, 1 sequences: eager equal" in text
        assert re.search(r"^\| run \| adamw \| 0.001 \| .* \| 2 of 2 \| \d+ \| ", text, re.M)


def script(*words, home, **variables):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "TRITIUM_HOME": str(home),
        **variables,
    }
    command = [str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_script_runs_a_command_and_passes_the_commit(tmp_path):
    out = tmp_path / "new" / "out"
    done = script("tune", out, "--rehearse", home=tmp_path, TRITIUM_COMMIT="abc1234")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--- layer_norm: done" in done.stdout
    record = read_record(out / "tune.json", "device")
    assert record["commit"] == record["records"]["layer_norm.json"]["commit"] == "abc1234"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), USAGE),
        (("all", "{tmp}"), USAGE),
        (("train",), USAGE),
        (("train", "/proc/nowhere"), "cannot write to /proc/nowhere"),
        (("train", "{tmp}", "--quick"), "unknown option --quick; the only one is --rehearse"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words, message, tmp_path):
    done = script(*(word.replace("{tmp}", str(tmp_path)) for word in words), home=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# --- the real commands, which only a GPU machine runs


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_deadlines_rise_to_less_than_nine_minutes(command, rehearse):
    parts = COMMANDS[command](rehearse)
    deadlines = [part.until for part in parts]
    assert deadlines == sorted(deadlines)
    assert deadlines[-1] <= TOTAL_SECONDS < 540
    assert len({part.name for part in parts}) == len(parts)


def test_the_files_and_commands_of_all_parts_exist():
    for parts in (command(rehearse) for command in COMMANDS.values() for rehearse in (False, True)):
        for part in parts:
            for word in part.words:
                assert not word.startswith("tests/") or (ROOT / word).exists(), word


def test_shapes_and_variants_fit_their_operators():
    cpu = torch.device("cpu")
    for names, shapes in KERNEL_SHAPES:
        for name in names.split():
            assert shapes_of(OPERATORS[name], shapes.split(), cpu)
    for name, shapes, variants, _ in TUNED:
        assert shapes_of(OPERATORS[name], shapes.split(), cpu)
        assert set(variants.split()) <= {variant.name for variant in VARIANTS[name]}


class ParsedError(Exception):
    """Raised instead of running a command whose words are valid."""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_words_of_all_parts_are_parsed(command, monkeypatch):
    def parse_and_stop(*args, cli=tyro.cli, **keywords):
        raise ParsedError(cli(*args, **keywords))

    monkeypatch.setattr(tyro, "cli", parse_and_stop)
    for part in COMMANDS[command](False):
        if part.words[:2] == ("-m", "tritium") and part.words[2] != "info":
            with pytest.raises(ParsedError) as parsed:
                dispatch(list(part.words[2:]))
            if part.words[2:4] == ("bench", "tune"):
                options = parsed.value.args[0]
                assert shapes_of(OPERATORS[options.operator], options.shape, torch.device("cpu"))


# --- parts that do not end well


def python(code: str) -> Part:
    return Part(name="part", words=("-c", code), until=60)


def test_parts_marked_together_run_at_the_same_time(monkeypatch, tmp_path):
    """Each of the two programs waits for a file that the other one writes."""
    code = (
        "import pathlib, sys, time; here, other = map(pathlib.Path, sys.argv[1:]); here.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    files = [str(tmp_path / name) for name in ("a", "b")]
    parts = [
        Part(name=name, words=("-c", code, *order), until=60, together=name == "second")
        for name, order in (("first", files), ("second", files[::-1]))
    ]
    monkeypatch.setitem(COMMANDS, "train", lambda rehearse: parts)
    assert device.run_command("train", tmp_path, rehearse=True) == 0


@pytest.mark.parametrize(
    ("code", "seconds", "status", "last_line"),
    [
        ("print('a'); print('b')", 60, "done", "b"),
        ("print('FAILED tests/a.py::test_x - no'); exit(3)", 60, "failed", "FAILED tests/a.py"),
        ("print('begun', flush=True); import time; time.sleep(60)", 2, "stopped", "begun"),
        ("", 0, "skipped", ""),
    ],
)
def test_a_part_says_how_it_ended(code, seconds, status, last_line, tmp_path):
    end = device.run_part(python(code), tmp_path, seconds, lambda: None)
    assert end["status"] == status
    assert end["last_line"].startswith(last_line)
    if status == "failed":
        assert end["failed_tests"] == ["tests/a.py::test_x"]


def test_the_last_line_has_no_path_of_this_machine(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    code = f"print('written: {folder}/a.json, cache {device.ROOT}/.cache')"
    end = device.run_part(python(code), folder, 60, lambda: None)
    assert end["last_line"] == "written: OUT_DIR/train/a.json, cache .cache"


def test_records_are_files_with_provenance(tmp_path):
    """A run's tokenizer.json has a kind, too."""
    folder = tmp_path / "train"
    folder.mkdir()
    write_record(folder / "a.json", "machine", {})
    (folder / "tokenizer.json").write_text('{"kind": "chars"}')
    device.save_files("train", tmp_path, [], rehearse=True)
    assert read_record(tmp_path / "train.json", "device")["records"].keys() == {"a.json"}


@pytest.mark.parametrize("command", ["short", "train", "models"])
def test_the_options_of_bench_train_are_known(command, monkeypatch, tmp_path):
    configs = []
    monkeypatch.setattr(training, "measure", lambda config, *_: configs.append(config) or {})
    for part in COMMANDS[command](False):
        if part.words[:4] == ("-m", "tritium", "bench", "train"):
            words = [word.replace("FOLDER", str(tmp_path)) for word in part.words[4:]]
            with pytest.raises(KeyError):  # no figures to print
                training.main(words)
    assert configs
    large = [config for config in configs if config.model.d_model > 768]
    assert all(config.execution.cuda_graph == "off" for config in large)


def test_rows_of_runs_have_seconds_if_the_run_is_complete(tmp_path):
    ends = {"goodput": {}, "time": 1.0, "skipped_steps": 0}
    lines = [
        {"step": 1, "val_loss": 3.0},
        {"step": 1, "wall_seconds": 5.0, **ends},
        {"step": 2, "val_loss": 2.0},
        {"step": 2, "wall_seconds": 9.0, **ends},
    ]
    for name, count in (("a", 4), ("b", 3), ("fill", 4), ("no run", 0)):
        folder = tmp_path / name
        folder.mkdir()
        config = {"train": {"steps": 2, "out": "/a/path"}} if count else {}
        (folder / "config.json").write_text(json.dumps(config))
        text = "".join(json.dumps(line) + "\n" for line in lines[:count])
        (folder / "metrics.jsonl").write_text(text)
    row = {"train": {"steps": 2}, "evaluations": [[1, 3.0], [2, 2.0]]}
    assert device._rows_of_runs(tmp_path) == [
        {"name": "a", **row, "seconds": 9.0},
        {"name": "b", **row, "seconds": None},
    ]


def test_a_program_that_is_not_installed_fails(tmp_path):
    part = Part(name="races", words=("--version",), until=60, program="no-such-sanitizer")
    end = device.run_part(part, tmp_path, 60, lambda: None)
    assert (end["status"], end["last_line"]) == ("failed", "no-such-sanitizer is not installed")


def test_a_killed_command_leaves_its_results_and_stops_its_part(tmp_path):
    code = """
import sys
from pathlib import Path
from tritium.bench import device
from tritium.bench._device_parts import COMMANDS, Part
device.SAVE_SECONDS = 0.2
sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
parts = [Part(name=name, words=("-c", code), until=60)
         for name, code in (("quick", "print(1)"), ("slow", sleep))]
COMMANDS["train"] = lambda rehearse: parts
device.main(["train", sys.argv[1]])
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    log, saved = tmp_path / "train" / "slow.log", tmp_path / "train.tar.gz"
    wait_until(lambda: log.exists() and log.read_text().strip())
    wait_until(lambda: "train/slow.log" in names_in(saved))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    record = json.loads((tmp_path / "train.json").read_text())
    assert [part["name"] for part in record["parts"]] == ["quick"]
    assert {"train/quick.log", "train/slow.log"} <= names_in(saved)
    wait_until(lambda: not Path(f"/proc/{int(log.read_text())}").exists())


def names_in(archive):
    with tarfile.open(archive) as tar:
        return set(tar.getnames())


def wait_until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)
