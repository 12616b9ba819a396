import pytest

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.start.new_run import new_config

pytestmark = pytest.mark.plain

BASE = TrainConfig.from_options(
    batch_size=512, micro_batch_size=32, tokenizer="bpe:300", n_layer=2, n_head=2, d_model=32
)


def test_the_micro_batch_of_the_recipe_divides_a_new_batch():
    assert new_config(BASE, {"batch_size": 48}).execution.micro_batch_size == 16
    assert new_config(BASE, {"lr": 1.0}).execution.micro_batch_size == 32
    given = {"batch_size": 48, "micro_batch_size": 3}
    assert new_config(BASE, given).execution.micro_batch_size == 3
    with pytest.raises(InputError, match="batch_size: expected 1 or more"):
        new_config(BASE, {"batch_size": 0})


def test_a_run_that_starts_from_a_model_has_its_shape(tmp_path):
    shape = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=257, context_tokens=8)
    GPT(shape).save_pretrained(tmp_path / "model")
    given = {"init_from": str(tmp_path / "model"), "tokenizer": "bytes"}
    config = new_config(BASE, given)
    assert (config.model.n_layer, config.model.d_model) == (1, 16)
    assert config.tokenizer == "bytes"
    with pytest.raises(InputError, match=r"n_layer: expected 1, as in .*, got 3; leave it out"):
        new_config(BASE, given | {"n_layer": 3})
    # Also if the recipe has the same value.
    recipe_layers = BASE.model.n_layer
    assert recipe_layers != 1
    with pytest.raises(InputError, match=f"n_layer: expected 1, as in .*, got {recipe_layers}"):
        new_config(BASE, given | {"n_layer": recipe_layers})
    del given["tokenizer"]
    with pytest.raises(InputError, match=r"tokenizer: expected the tokenizer of .* came without"):
        new_config(BASE, given)
