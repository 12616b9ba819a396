"""A small run to fine-tune, and records."""

import json

import pytest

# Words that a model of bytes learns in a few hundred steps.
_WORDS = ("red", "blue", "dog", "sun", "tree", "sea", "cat", "ant", "owl", "ice")


@pytest.fixture(scope="session")
def records() -> list[dict[str, str]]:
    """20 instructions with different answers."""
    return [
        {
            "instruction": f"Say {first} {number}",
            "input": second if number % 2 else "",
            "output": f"{second}, then {first}.",
        }
        for number, (first, second) in enumerate(zip(_WORDS * 2, _WORDS[::-1] * 2, strict=True))
    ]


@pytest.fixture
def file(records, tmp_path):
    """The records as a json file."""
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def base(tiny, tritium, tmp_path):
    """A run with a context of 64 bytes, and one step of training."""
    words = ["--context-tokens", 64, "--d-model", 32, "--steps", 1, "--out", tmp_path / "base"]
    assert tritium(*tiny, *words)[0] == 0
    return tmp_path / "base"
