"""Pretended GPUs, modules of others, the best of several configurations; on small projects of our own, and no network."""

import sys
import types

import pytest
import torch
import triton

from tritium.bench import peers
from tritium.bench.launches import Launch
from tritium.bench.peers import best, function, imported, pretend_gpu, tutorial_version
from tritium.train.config import InputError

pytestmark = pytest.mark.plain


@pytest.fixture
def project(tmp_path):
    """A package whose __init__ cannot be imported, with a module that can."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "__init__.py").write_text("raise ImportError('the rest of the project')")
    (tmp_path / "project" / "part.py").write_text("from einops import reduce\nfrom project import __version__\n")
    return tmp_path


def test_nothing_is_left_behind(project):
    before, driver, capability = set(sys.modules), triton.runtime.driver._active, torch.cuda.get_device_capability
    with pretend_gpu("sm_90"):
        assert torch.cuda.get_device_capability() == (9, 0)
        with imported("project.part", project, ("project",), ("einops",)) as module:
            assert module.reduce(3, "a -> b") == 3
    assert triton.runtime.driver._active is driver
    assert torch.cuda.get_device_capability is capability
    assert not [name for name in set(sys.modules) - before if name.split(".")[0] in ("project", "einops")]


def test_what_stands_behind_the_last_function_is_left_out(tmp_path):
    (tmp_path / "measures-itself.py").write_text("def first(): pass\ndef last(): return 3\nraise RuntimeError('no GPU')\n")
    with imported("measures-itself", tmp_path, last="last") as module:
        assert function(module, "last")() == 3
        with pytest.raises(InputError, match=r"measures-itself\.py: expected a function `third`, found none"):
            function(module, "third")
    with pytest.raises(InputError, match="RuntimeError: no GPU"), imported("measures-itself", tmp_path, last="third"):
        pass


def test_of_configurations_those_that_fit_and_do_not_spill_are_better(monkeypatch):
    kernel = types.SimpleNamespace(params=[types.SimpleNamespace(name="BLOCK", is_constexpr=True)])
    rows = {  # blocks, spilled bytes, serial
        16: (0, 0, 0.9),
        32: (1, 8, 0.8),
        64: (1, 0, 0.5),
        128: (1, 0, 0.6),
    }

    def compile_launch(launch, arch):
        if launch.arguments["BLOCK"] == 256:
            raise RuntimeError("PassManager::run failed")
        return rows[launch.arguments["BLOCK"]]

    def describe(launch, compiled, text):
        blocks, spilled, serial = compiled
        estimate = {"serial": serial, "overlapped": 1.0}
        return {"num_warps": 4, "blocks_per_sm": blocks, "spilled_bytes": spilled, "hottest_loop": {"estimate": estimate}}

    monkeypatch.setattr(peers, "compile_launch", compile_launch)
    monkeypatch.setattr(peers, "disassemblies", lambda kernels: [""] * len(kernels))
    launches = [Launch(kernel=kernel, grid=(1,), arguments={"BLOCK": block, "num_warps": 4}) for block in (*rows, 256, 64)]
    found = best(launches, "sm_90", describe)
    assert found["config"] == {"BLOCK": 128, "num_warps": 4}
    assert (found["configs"], found["failed"]) == (5, 1), "one was launched twice"
    assert best(launches[4:5], "sm_90", describe) == {"configs": 1, "failed": 1, "error": "PassManager::run failed"}


def test_a_tutorial_is_known_by_what_its_file_holds(tmp_path):
    path = tmp_path / "tutorial.py"
    path.write_bytes(b"")
    assert tutorial_version(path, "tutorial.py")["sha256"].startswith("e3b0c44298fc1c14")
    with pytest.raises(InputError, match=r"--tutorial: expected the file tutorial\.py, found none at .*nowhere"):
        tutorial_version(tmp_path / "nowhere", "tutorial.py")
