import pytest

from tritium.model import PRESETS

pytestmark = pytest.mark.plain


def test_unknown_presets_list_the_near_ones():
    with pytest.raises(KeyError, match="unknown preset 'gpt2-larg'; did you mean 'gpt2-large'"):
        PRESETS["gpt2-larg"]
    assert sorted(PRESETS) == ["gpt2", "gpt2-large", "gpt2-medium", "gpt2-xl", "llama-124m"]
