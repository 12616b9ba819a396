"""bench/device.sh as a rehearsal: every part on the CPU at tiny sizes, and bad arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritium.bench.record import read_record

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "device.sh"


def device(*words, home):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "TRITIUM_HOME": str(home),
    }
    command = [str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_part_runs_and_leaves_its_results(tmp_path):
    out = tmp_path / "new" / "out"
    done = device(out, "--rehearse", home=tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("machine", "tests-layer_norm", "kernels", "train", "run"):
        assert f"\n{part}: done" in f"\n{done.stdout}", part
    entries = read_record(out / "kernels.json", "kernels")["entries"]
    assert [entry["operator"] for entry in entries] == ["layer_norm", "add_layer_norm"]
    trained = read_record(out / "train.json", "train")["implementations"]
    assert set(trained) == {"tritium", "baseline"}
    assert (out / "metrics.jsonl").read_text().count("\n") == 3
    assert (out / "plots-and-logs.tar.gz").stat().st_size > 1000
    assert "shakespeare-char, " in done.stdout


def test_every_test_file_of_the_script_exists():
    words = SCRIPT.read_text().replace('"', " ").replace(",", " ").split()
    files = {word for word in words if word.endswith(".py")}
    assert len(files) >= 10
    for file in files:
        assert (ROOT / "tests" / "kernels" / file).is_file(), file


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "usage: bench/device.sh OUT_DIR"),
        (("/proc/nowhere",), "cannot write to /proc/nowhere"),
        (("{tmp}", "--quick"), "unknown option --quick; the only one is --rehearse"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words, message, tmp_path):
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    done = device(*words, home=tmp_path / "home")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
