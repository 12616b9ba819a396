import pytest

from tritium.model import GPTConfig

pytestmark = pytest.mark.plain


def test_sizes_that_follow_from_others():
    config = GPTConfig(n_layer=2, n_head=6, d_model=48, vocab_size=65, n_kv_head=2)
    assert (config.kv_heads, config.head_size, config.d_feedforward, config.padded_vocab_size) == (
        2,
        8,
        192,
        128,
    )
    assert GPTConfig().padded_vocab_size == 50_304
    assert GPTConfig(mlp="swiglu").d_feedforward == 2048 == 8 * 768 // 3
    assert GPTConfig(mlp="swiglu", d_model=1600, n_head=25).d_feedforward == 4288, (
        "a multiple of 64"
    )
    assert GPTConfig(vocab_size=64).padded_vocab_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"n_kv_head": -1}, "n_kv_head must be at least 1, got -1"),
        ({"n_head": 5}, r"d_model must be a multiple of n_head \(5\), got 768"),
        ({"n_kv_head": 5}, r"n_head must be a multiple of n_kv_head \(5\), got 12"),
        ({"position": "alibi"}, r"position must be learned or rotary, got 'alibi'"),
        ({"norm": "batch"}, r"norm must be layer or rms, got 'batch'"),
        ({"mlp": "relu"}, r"mlp must be gelu or swiglu, got 'relu'"),
        (
            {"position": "rotary", "d_model": 36},
            r"rotary positions need an even head size, got 3; change n_head",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match="^GPTConfig: " + message):
        GPTConfig(**change)
