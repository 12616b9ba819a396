"""bench/device.sh, rehearsed: every part on the CPU at tiny sizes, and what it does when it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritium.bench.record import read_record

pytestmark = pytest.mark.plain

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "device.sh"


def device(*words):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([str(SCRIPT), *map(str, words)], capture_output=True, text=True, env=environment)


def test_every_part_runs_and_leaves_its_results(tmp_path):
    out = tmp_path / "new" / "out"
    done = device(out, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("machine", "tests-layer_norm", "kernels", "train", "run"):
        assert f"\n{part}: done" in f"\n{done.stdout}", part
    entries = read_record(out / "kernels.json", "kernels")["entries"]
    assert [entry["operator"] for entry in entries] == ["layer_norm", "add_layer_norm"]
    assert set(read_record(out / "train.json", "train")["contestants"]) == {"tritium", "baseline"}
    assert (out / "metrics.jsonl").read_text().count("\n") == 3
    assert (out / "plots-and-logs.tar.gz").stat().st_size > 1000
    assert "Training shakespeare-char" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "usage: bench/device.sh OUT_DIR"),
        (("/proc/nowhere",), "cannot write to /proc/nowhere"),
        (("{tmp}", "--quick"), "no option --quick; only --rehearse"),
    ],
)
def test_bad_input(words, message, tmp_path):
    done = device(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
