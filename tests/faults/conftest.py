"""A small run, and a way to start it in another process."""

from pathlib import Path

import pytest

from tests.faults.processes import Processes
from tests.faults.table import FaultTable

IMPORTS = "from tritium.train import evaluate, loop, pretrain, session, trainer\nimport os, torch\n"


def pytest_addoption(parser):
    parser.addoption("--fault-table", type=Path, help="write a table of the fault tests here")
    parser.addoption("--kills", type=int, default=20, help="how often a run is killed at random")


def pytest_configure(config):
    file = config.getoption("fault_table", None)
    is_worker = hasattr(config, "workerinput")  # a process of pytest -n: it sends its reports
    if file and not is_worker:
        config.pluginmanager.register(FaultTable(config, file.absolute()))


@pytest.fixture(scope="session")
def processes():
    found = Processes()
    yield found
    found.close()


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Words of a command that takes about a second."""
    text = tmp_path / "corpus.txt"
    text.write_text("the quick brown fox jumps over a lazy dog\n" * 300)
    return [
        *("train", "laptop", "--data", str(text), "--tokenizer", "bytes", "--device", "cpu"),
        *("--n-layer", "1", "--n-head", "2", "--d-model", "16", "--context-tokens", "16"),
        *("--steps", "20", "--batch-size", "4", "--warmup-steps", "2", "--sample-tokens", "5"),
        *("--eval-interval", "10", "--eval-tokens", "64", "--checkpoint-interval", "10"),
        *("--optimizer", "adamw", "--lr", "3e-3", "--min-lr", "1e-4"),
    ]


@pytest.fixture
def begin(processes, tmp_path):
    """Start a command after a hook, with a cache of its own. Its output goes to a folder `name`."""

    def call(words, hook="", name="process"):
        home = f"os.environ['TRITIUM_HOME'] = {str(tmp_path / 'home')!r}\n"
        return processes.start(words, tmp_path / name, IMPORTS + home + hook)

    return call
