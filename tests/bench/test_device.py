"""bench/device.sh, rehearsed: every part on the CPU at tiny sizes, and what it does when it cannot."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tritium.bench.record import read_record

pytestmark = pytest.mark.plain

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "device.sh"


def device(*words, cache):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "TRITIUM_HOME": str(cache),
    }
    return subprocess.run(
        [str(SCRIPT), *map(str, words)], capture_output=True, text=True, env=environment
    )


def test_every_part_ends_within_nine_minutes():
    """Deadlines are seconds from the start, so the last one bounds the whole; the parts before it come in order."""
    text = SCRIPT.read_text()
    ends = [int(end) for end in re.findall(r"\bpart [\w-]+ (\d+) ", text)]
    first, step = (
        int(number)
        for number in re.search(
            r"green=\(\) end=(\d+)[\s\S]*?end=\$\(\(end \+ (\d+)\)\)", text
        ).groups()
    )
    tested = len(re.findall(r"\w+:\S", text.split("files=(layer_norm")[2].split(")")[0])) + 1
    assert ends == sorted(ends)
    assert ends[-1] < 9 * 60 - 10
    assert first + step * tested < ends[-3], "tests leave time for kernels"


def test_every_part_runs_and_leaves_its_results(tmp_path):
    out = tmp_path / "new" / "out"
    done = device(out, "--rehearse", cache=tmp_path / "cache")
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
    done = device(
        *(word.replace("{tmp}", str(tmp_path)) for word in words), cache=tmp_path / "cache"
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
