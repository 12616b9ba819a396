"""The examples that train: at a tiny size, in this process."""

import functools
import json

import pytest

import tritium
from tests.examples.conftest import EXAMPLES
from tritium.train import api

pytestmark = pytest.mark.plain

TINY = {
    **{"tokenizer": "bytes", "n_layer": 1, "n_head": 2, "d_model": 16, "context_tokens": 64},
    **{"steps": 4, "warmup_steps": 1, "batch_size": 2, "eval_interval": 2, "eval_tokens": 64},
    **{"sample_tokens": 2, "device": "cpu"},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a small text, where a training takes less than a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over a lazy dog\n" * 50)
    train = api.train
    monkeypatch.setattr(api, "train", lambda *words, **options: train(*words, **options | TINY))
    return tmp_path


def test_the_notebook_trains_and_plots(tiny, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setitem(TINY, "data", "corpus.txt")
    notebook = json.loads((EXAMPLES / "train_and_plot.ipynb").read_text(encoding="utf-8"))
    scope = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]  # the file is committed without outputs
            exec("".join(cell["source"]), scope)
    assert [step for step, _ in scope["bits"]] == [2, 4]
    left, right = scope["figure"].axes
    assert len(left.lines[0].get_xdata()) == 4
    assert len(right.lines[0].get_xdata()) == 2
    pyplot.close(scope["figure"])


def test_text_becomes_a_chat_model(example, tiny, monkeypatch):
    finetune = functools.partial(tritium.finetune, answer_tokens=2)
    monkeypatch.setattr(tritium, "finetune", finetune, raising=False)
    answers = example("finetune_to_chat").main("capitals", tuning_steps=2)
    assert len(answers) == 3
    assert (tiny / "capitals" / "tuned" / "answers.jsonl").is_file()
    lines = (tiny / "capitals" / "records.jsonl").read_text().splitlines()
    assert len(lines) == len(example("finetune_to_chat").CAPITALS)


def test_the_trigram_model_predicts_a_text(example, tiny, capsys):
    from tritium.train.data.build import build

    build("shards", ["corpus.txt"], "bytes", progress=False)
    example("trigram").main("shards", "corpus.txt")
    assert "nats per token over 2,100 tokens" in capsys.readouterr().out
