import importlib.util

import pytest

from tritium.model import GPTConfig
from tritium.model.choices import (
    ATTENTIONS,
    MLPS,
    NORMS,
    RECOMPUTATIONS,
    check_attention_options,
    check_recompute,
    choose_attention,
)

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("table", [NORMS, MLPS, ATTENTIONS, RECOMPUTATIONS])
def test_every_row_finds_its_implementation(table):
    assert all(row.load() is not None for row in table.values())


def test_attention_without_its_package_raises(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = (
        "attention: expected an installed flash-attn, found none; "
        r"pip install 'tritium\[flash-attn\]', or set attention to tritium"
    )
    with pytest.raises(ValueError, match=message):
        choose_attention("flash-attn")


def test_mode_that_the_mlp_does_not_have_raises():
    message = "recompute: gelu needs mlp gelu or gelu_exact, got swiglu; use none, "
    with pytest.raises(ValueError, match=message):
        check_recompute("gelu", GPTConfig(mlp="swiglu"))


def test_options_of_an_unknown_attention_raise():
    with pytest.raises(ValueError, match="attention: unknown implementation 'sdpaa'; did you"):
        check_attention_options("sdpaa", GPTConfig())


def test_option_that_an_attention_does_not_support_raises():
    message = "attention: expected tritium with softcap 5.0, got sdpa, which does not support"
    with pytest.raises(ValueError, match=message):
        check_attention_options("sdpa", GPTConfig(softcap=5.0))
