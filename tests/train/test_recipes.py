import pytest

from tritium.errors import InputError
from tritium.model import PRESETS
from tritium.train.recipes import RECIPES, default_recipe, recipe

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_of_published_models_have_their_shape(name):
    preset = PRESETS[name]
    assert recipe(name).gpt(vocab_size=preset.vocab_size) == preset


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown recipe 'shakespeare'; did you mean"):
        recipe("shakespeare")


def test_the_default_recipe_exists():
    assert default_recipe() in RECIPES
