import pytest

from tritium.errors import InputError
from tritium.model import PRESETS, GPTConfig
from tritium.model.cost import parameters
from tritium.train.data.epochs import estimate_corpus_tokens
from tritium.train.data.tokenizers.tokenizer import vocab_size_of
from tritium.train.recipes import RECIPES, default_recipe, recipe

pytestmark = pytest.mark.plain


def test_recipes_of_published_models_have_their_shape_and_vocabulary():
    """So that a run has the parameters that `tritium plan` and README give."""
    for name, preset in PRESETS.items():
        config = recipe(name)
        assert config.gpt(vocab_size_of(config.tokenizer)) == preset
    assert parameters(PRESETS["gpt2"]) == 124_439_808


def test_recipes_with_data_of_others_train_for_about_one_epoch():
    for name in ("gpt2-fineweb", "gpt2-fineweb-edu"):
        config = recipe(name)
        assert config.tokenizer == "gpt2"
        tokens = config.steps * config.batch_size * config.model.context_tokens
        assert 0.9 < tokens / estimate_corpus_tokens(config) < 1.1


def test_the_recipe_to_compare_with_nanogpt_has_its_model():
    model = recipe("shakespeare-char").gpt(vocab_size=128)
    shape = {"n_layer": 4, "n_head": 4, "d_model": 128, "context_tokens": 64, "vocab_size": 128}
    assert model == GPTConfig(**shape, bias=False, mlp="gelu_exact")


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown recipe 'shakespeare'; did you mean"):
        recipe("shakespeare")


def test_the_default_recipe_exists():
    assert default_recipe() in RECIPES
