import json

import pytest

from tritium.train import loop
from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain


@pytest.fixture
def files(tmp_path):
    text = tmp_path / "held out.txt"
    text.write_text("the quick fox mixes potions while seven dogs jump " * 4)
    choices = tmp_path / "tiny.jsonl"
    choices.write_text(
        json.dumps({"context": "the quick", "choices": [" fox", " zzz"], "label": 0}) + "\n"
    )
    return text, choices


def test_a_run_evaluates_texts_and_choices(tritium, tiny, files, tmp_path, monkeypatch):
    text, choices = files
    words = ("--eval-text", f"held-out={text}", "--eval-choice", choices)
    status, _, err = tritium(*tiny, *words)
    assert status == 0, err
    assert "text/held-out/bits_per_byte" in err
    evaluations = read_metrics(tmp_path / "run")[1]
    assert [line["step"] for line in evaluations] == [10, 20]
    for line in evaluations:
        assert {"text/held-out/loss", "text/held-out/bits_per_byte"} < set(line)
        assert line["choice/tiny/accuracy_sum"] in (0, 1)

    # The last line has the values of the commands.
    status, out, err = tritium("eval", "perplexity", tmp_path / "run", text, "--stride", 16)
    assert status == 0, err
    assert f"{evaluations[-1]['text/held-out/bits_per_byte']:.4f} bits per byte" in out
    status, out, err = tritium("eval", "choice", tmp_path / "run", choices)
    assert status == 0, err
    assert f"{evaluations[-1]['choice/tiny/accuracy_per_token']:.4f}" in out

    # Evaluations change nothing else, and a resumed run has them too.
    monkeypatch.setattr(loop, "open_evaluations", lambda config, tokenizer: None)
    assert tritium(*tiny, "--out", tmp_path / "other")[0] == 0
    one, other = (read_metrics(tmp_path / name)[0] for name in ("run", "other"))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]


def test_bad_files_are_one_line_before_the_run_begins(error_of, tiny, files, tmp_path):
    text, choices = files
    choices.write_text("{}\n")
    short = tmp_path / "short.txt"
    short.write_text("a")
    expected = {
        ("--eval-text", text): "--eval-text: expected NAME=FILE",
        ("--eval-text", f"a={text}", f"a={short}"): "--eval-text: expected different names",
        ("--eval-text", f"a={short}"): "short.txt: expected at least 16 tokens, one window, got 1",
        ("--eval-text", "a=nowhere.txt"): "nowhere.txt: No such file",
        ("--eval-choice", choices): "tiny.jsonl:1: expected the keys of a format",
    }
    for words, message in expected.items():
        assert message in error_of(*tiny, *words)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_several_ranks_evaluate_on_rank_0(launch, tiny, files, tmp_path):
    text, choices = files
    words = ("--eval-text", f"held-out={text}", "--eval-choice", choices)
    status, _, errors = launch(2, *tiny[1:], *words, "--parallel", "fsdp")
    assert status == [0, 0], errors
    line = read_metrics(tmp_path / "run")[1][-1]
    assert {"text/held-out/loss", "choice/tiny/accuracy_sum"} < set(line)
