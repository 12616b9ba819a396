"""The package installed elsewhere: the wheel's contents."""

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tritium.bench.training.efficiency import GOLDEN_TABLE

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"  # builds leave folders behind that a later wheel would pick up
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"),
    )
    words = ["wheel", str(copy), "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("tritium-*.whl"))) as opened:
        yield opened


def test_the_wheel_holds_every_package_and_no_tests(wheel):
    names = [name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")]
    table = GOLDEN_TABLE.relative_to(ROOT)  # `tritium bench predict` reads it
    sources = {"__init__.py", "__main__.py", "errors.py", str(table)} | {
        str(path.relative_to(ROOT))
        for folder in ("kernels", "model", "train", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if not path.name.startswith("test_")
    }
    assert {name.removeprefix("tritium/") for name in names} == sources


def test_entry_points_of_the_wheel_exist(wheel):
    """lm_eval reads lm_eval.models. It is an extra, so its class is looked up in the source."""
    (file,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(wheel.read(file).decode())
    found = {(group, name) for group in points.sections() for name in points[group]}
    assert found == {("console_scripts", "tritium"), ("lm_eval.models", "tritium")}
    for group, name in found:
        module, function = points[group][name].split(":")
        source = ast.parse(wheel.read(module.replace(".", "/") + ".py"))
        assert function in {getattr(node, "name", None) for node in source.body}
