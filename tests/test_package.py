"""The package installed elsewhere: the wheel's contents."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_holds_every_package_and_no_tests(tmp_path):
    pytest.importorskip("setuptools")
    copy = tmp_path / "copy"  # builds leave folders behind that a later wheel would pick up
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"),
    )
    words = ["wheel", str(copy), "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("tritium-*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")]
    sources = {"__init__.py", "__main__.py", "errors.py"} | {
        str(path.relative_to(ROOT))
        for folder in ("kernels", "model", "train", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if not path.name.startswith("test_")
    }
    assert {name.removeprefix("tritium/") for name in names} == sources
