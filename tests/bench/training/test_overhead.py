import pytest

from tritium.bench.record import provenance
from tritium.bench.training.overhead import Options, _describe, measure
from tritium.train.recipes import recipe

pytestmark = pytest.mark.plain


def test_the_cost_of_checkpoints_and_of_the_judgement_is_measured(tmp_path):
    sizes = {"n_layer": 1, "n_head": 2, "d_model": 16, "context_tokens": 16, "batch_size": 2}
    config = recipe("laptop").with_options(tokenizer="bytes", device="cpu", **sizes)
    found = measure(config, Options(rounds=2, steps=1), tmp_path)
    assert found["memory"]["buffer_fraction"] == pytest.approx(1, rel=0.01)
    assert 0 < found["judgement"]["cpu_fraction"] < 1
    assert (tmp_path / "checkpoints" / "step-2").is_dir()
    table = _describe(provenance() | found | {"recipe": "laptop"})
    assert "| the same, every 200 steps |" in table
