"""Commands with any options and prompts: status 0, or status 2 with one line, and nothing written.

`pytest -m slow tests/faults/test_fuzz_commands.py` tries more examples.
"""

import contextlib
import io
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.test_fuzz_folder import NUMBERS, folders  # noqa: F401 - a fixture
from tritium.__main__ import dispatch
from tritium.errors import InputError
from tritium.train.commands import cli
from tritium.train.commands.training import _resume, _running
from tritium.train.config import PART_OF

pytestmark = pytest.mark.plain

EXAMPLES = [20, pytest.param(300, marks=pytest.mark.slow)]
# A word of a command line has no NUL. Bytes that are not UTF-8 become single surrogates.
TEXT = st.text("ab-=_ 019./\\\n\u00e9\udcff\U0001f600", max_size=8)
NAMES = ["../x", "/etc/hostname", ".", "", "cuda:9", "stdlib", "auto", "None", "True", "x" * 5000]
VALUES = st.one_of(
    st.sampled_from([*map(str, NUMBERS), "1e999", "1_0", "0x10"]), st.sampled_from(NAMES), TEXT
)
TRAIN = [*PART_OF, "resume", "change", "parallel", "rank_timeout", "steeps", "no_tied_head"]
SAMPLE = ["prompt", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed"]
SAMPLE += ["tokenizer", "device", "precision", "max_new_tokens", "promt"]


def options(names: list[str]) -> st.SearchStrategy:
    """Return a strategy for the words of up to four options."""
    flags = st.sampled_from(names).map(lambda name: "--" + name.replace("_", "-"))
    pairs = st.tuples(flags, VALUES)
    words = pairs.map(list) | pairs.map("=".join).map(lambda word: [word]) | TEXT.map(lambda x: [x])
    return st.lists(words, min_size=1, max_size=4).map(
        lambda found: list(itertools.chain.from_iterable(found))
    )


def check(strategy: st.SearchStrategy, examples: int, command, folder, monkeypatch) -> None:
    """Run `command(words)` for words of the strategy, in a folder that must not change."""
    inside = folder / "inside"
    inside.mkdir(exist_ok=True)
    monkeypatch.chdir(inside)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    @settings(
        max_examples=examples,
        deadline=10_000,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(words: list[str]) -> None:
        err = io.StringIO()
        status = 0
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = cli.run(dispatch, command(words))
            except SystemExit as stop:  # --help
                status = stop.code or 0
        assert status in (0, 2), err.getvalue()
        assert err.getvalue().count("tritium: ") == (status == 2), err.getvalue()

    run()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_options_of_train(folders, examples, monkeypatch):  # noqa: F811
    """The run itself does not start."""

    def stop(*arguments, **options):
        raise InputError("the run would start")

    monkeypatch.setattr(_running, "start", stop)
    monkeypatch.setattr(_running, "resume", stop)
    monkeypatch.setattr(_resume, "resume", stop)
    out = ["--out", str(folders / "never")]
    strategy = options(TRAIN)
    check(strategy, examples, lambda words: ["train", *words, *out], folders, monkeypatch)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_options_and_prompts_of_sample(folders, examples, monkeypatch):  # noqa: F811
    run = str(folders / "run")
    end = ["--max-new-tokens", "2"]
    check(
        options(SAMPLE), examples, lambda words: ["sample", run, *words, *end], folders, monkeypatch
    )


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_prompt_is_continued(folders, examples, monkeypatch):  # noqa: F811
    run = str(folders / "run")
    prompts = st.text("ab \n\u00e9\udcff\U0001f600", max_size=20).map(lambda text: [text])
    words = ["sample", run, "--max-new-tokens", "2"]
    check(
        prompts,
        examples,
        lambda prompt: [*words, f"--prompt={prompt[0]}"],
        folders,
        monkeypatch,
    )
