"""The epochs of a run, and the estimate of a corpus's size."""

import pytest

from tritium.train.config import TrainConfig
from tritium.train.data.epochs import describe_epochs, estimate_corpus_tokens
from tritium.train.recipes import recipe

pytestmark = pytest.mark.plain


def test_more_than_four_epochs_give_advice():
    assert describe_epochs(4000, 1000, 0.0) == "4 epochs: 4,000 tokens from a corpus of 1,000"
    assert describe_epochs(36_400, 1000, 0.0).startswith("36.4 epochs: ")
    assert "begins to memorize" in describe_epochs(5000, 1000, 0.0)
    assert "or set dropout" in describe_epochs(5000, 1000, 0.0)
    assert "dropout" not in describe_epochs(5000, 1000, 0.1)


def test_estimate_is_the_size_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 4000)
    config = TrainConfig(data=(str(tmp_path / "a.txt"),), held_out=0.1, tokenizer="bytes")
    assert estimate_corpus_tokens(config) == 3600
    assert estimate_corpus_tokens(config.with_options(tokenizer="bpe:300")) == 900


def test_missing_files_have_no_estimate_and_named_corpora_need_no_network():
    assert estimate_corpus_tokens(TrainConfig(data=("missing.txt",))) is None
    assert estimate_corpus_tokens(recipe("shakespeare-char")) == 1_003_855
