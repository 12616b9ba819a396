"""Import the programs in examples/, which are not part of the package."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@functools.cache
def load(name: str) -> ModuleType:
    """Import examples/NAME.py, once: an operator can be defined only once."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # torch.compile looks for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example():
    """Import a program of examples/: example("trigram").main(...)."""
    return load
