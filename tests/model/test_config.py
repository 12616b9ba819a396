"""GPTConfig derives sizes and checks them."""

import pytest

from tritium.model import GPTConfig
from tritium.model.choices import MLPS, NORMS, POSITIONS

pytestmark = pytest.mark.plain


def test_kv_heads_are_n_head_by_default():
    assert GPTConfig(n_head=6, d_model=48).kv_heads == 6
    assert GPTConfig(n_head=6, d_model=48, n_kv_head=2).kv_heads == 2


def test_defaults_of_the_norm_and_the_mlp_can_be_replaced():
    assert GPTConfig(norm="layer").eps == 1e-5
    assert GPTConfig(norm="rms").eps == 1e-6
    assert GPTConfig(norm="rms", norm_eps=1e-5).eps == 1e-5
    assert GPTConfig(mlp="swiglu", d_hidden=100).d_feedforward == 100


def test_heads_share_d_model():
    assert GPTConfig(n_head=6, d_model=48, n_kv_head=2).head_size == 8


@pytest.mark.parametrize(("vocab_size", "rows"), [(64, 64), (65, 128), (50_257, 50_304)])
def test_embedding_rows_are_a_multiple_of_64(vocab_size, rows):
    assert GPTConfig(vocab_size=vocab_size).padded_vocab_size == rows


def test_gelu_mlp_is_four_times_as_wide_as_the_model():
    assert GPTConfig(n_head=6, d_model=48).d_feedforward == 192


@pytest.mark.parametrize(
    ("n_head", "d_model", "width"),
    [
        (12, 768, 2048),  # 8 * 768 / 3
        (25, 1600, 4288),  # 8 * 1600 / 3 = 4266.7, rounded up to a multiple of 64
    ],
)
def test_swiglu_mlp_is_eight_thirds_as_wide_as_the_model(n_head, d_model, width):
    assert GPTConfig(mlp="swiglu", n_head=n_head, d_model=d_model).d_feedforward == width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layer": 0}, "n_layer: expected 1 or more, got 0"),
        ({"n_layer": 2.0}, "n_layer: expected an integer, got 2.0"),
        ({"d_model": None}, "d_model: expected an integer, got None"),
        ({"d_hidden": True}, "d_hidden: expected an integer, got True"),
        ({"prefix_tokens": True}, "prefix_tokens: expected an integer of 0 or more, got True"),
        ({"n_kv_head": -1}, "n_kv_head: expected 1 or more, got -1"),
        ({"window": 0}, "window: expected 1 or more, got 0"),
        ({"prefix_tokens": -1}, "prefix_tokens: expected an integer of 0 or more, got -1"),
        ({"softcap": -1.0}, r"softcap: expected 0 or more, and finite, got -1\.0"),
        ({"d_hidden": 0}, "d_hidden: expected 1 or more, got 0"),
        ({"norm_eps": -1.0}, r"norm_eps: expected a positive number, got -1\.0"),
        ({"rope_base": float("inf")}, "rope_base: expected a positive number, got inf"),
        ({"n_head": 5}, "d_model: expected a multiple of `n_head`, 5, got 768"),
        ({"n_kv_head": 5}, "n_head: expected a multiple of `n_kv_head`, 5, got 12"),
        (
            {"position": "rotary", "d_model": 36},
            "position: expected an even head size for rotary, got 3; change `n_head`",
        ),
    ],
)
def test_invalid_size_raises(options, message):
    with pytest.raises(ValueError, match="^GPTConfig: " + message):
        GPTConfig(**options)


@pytest.mark.parametrize(
    ("option", "rows"), [("position", POSITIONS), ("norm", NORMS), ("mlp", MLPS)]
)
def test_unknown_choice_suggests_the_nearest_or_lists_the_rows(option, rows):
    message = f"^GPTConfig: unknown {option} 'other'; expected one of {', '.join(rows)}$"
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{option: "other"})
    name = next(iter(rows))
    message = f"^GPTConfig: unknown {option} '{name}s'; did you mean '{name}'"
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{option: f"{name}s"})
