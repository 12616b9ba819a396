"""Presets. tests/model/test_cost.py checks their numbers of parameters."""

import pytest

from tritium.model import PRESETS

pytestmark = pytest.mark.plain


def test_unknown_preset_raises_and_suggests_similar_names():
    with pytest.raises(KeyError, match="unknown preset 'gpt2-larg'; did you mean 'gpt2-large'"):
        PRESETS["gpt2-larg"]
