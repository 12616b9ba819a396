"""The formulas of cost.py, compared with models and with the memory that they hold.

tests/train/test_plan.py compares step_bytes with the memory that a whole step allocates.
"""

from dataclasses import replace

import pytest
import torch

from tests.held import Held
from tritium.model import GPT, PRESETS, GPTConfig
from tritium.model.choices import RECOMPUTATIONS
from tritium.model.cost import activation_bytes, flops_per_token, matrices, parameters, step_bytes
from tritium.train.precision import working_copy

pytestmark = pytest.mark.plain

SMALL = GPTConfig(n_layer=3, n_head=4, d_model=32, vocab_size=100, context_tokens=16, n_kv_head=2)
DROPOUT = {"dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1}
LLAMA = replace(SMALL, position="rotary", norm="rms", mlp="swiglu", bias=False)


def padding(config: GPTConfig) -> int:
    """Return the elements of the padding rows of embedding and head."""
    tables = 1 if config.tied_head else 2
    return tables * (config.padded_vocab_size - config.vocab_size) * config.d_model


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # the published GPT-2 checkpoints
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-124m", 123_551_232),
    ],
)
def test_presets_have_their_published_parameters(name, count):
    """tests/model/test_layers.py compares the formula with each combination of layers."""
    config = PRESETS[name]
    assert parameters(config) == count
    with torch.device("meta"):
        model = GPT(config)
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert elements - padding(config) == count


def test_flops_exclude_learned_positions_and_include_attention():
    """0.855 GFLOP per token: 124,439,808 parameters, 1024 * 768 of them learned positions."""
    expected = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(PRESETS["gpt2"], 1024) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"tied_head": False},
        {"qkv_bias": False},
        {"bias": False, "qkv_bias": True},
        {"qk_norm": True},
        {"window": 3, "softcap": 1.0, "head_softcap": 1.0},
    ],
    ids=str,
)
def test_options_have_the_parameters_of_the_formula(options):
    config = replace(SMALL, **options)
    with torch.device("meta"):
        model = GPT(config)
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert elements - padding(config) == parameters(config)


def test_flops_count_an_untied_embedding_as_a_lookup():
    config = PRESETS["gpt2"]
    untied = replace(config, tied_head=False)
    assert parameters(untied) == parameters(config) + 50_257 * 768
    assert flops_per_token(untied, 1024) == flops_per_token(config, 1024)


@pytest.mark.parametrize("window", [1, 100, 1024, 5000])
def test_flops_of_attention_count_twice_the_keys_that_a_window_shows(window):
    """Within one key: the formula counts T keys without a window, and twice the mean is T + 1."""
    config = replace(PRESETS["gpt2"], window=window)
    without = flops_per_token(PRESETS["gpt2"], 1024) - 12 * 12 * 768 * 1024
    keys = (flops_per_token(config, 1024) - without) / (12 * 12 * 768)
    visible = sum(min(window, i + 1) for i in range(1024)) / 1024
    assert abs(keys - 2 * visible) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "B", "T"),
    [
        (SMALL, 2, 16),
        (replace(SMALL, bias=False), 2, 16),
        (replace(SMALL, mlp="gelu_exact"), 2, 16),
        (LLAMA, 2, 16),
        (replace(SMALL, norm="rms", mlp="relu2"), 2, 16),
        (replace(SMALL, tied_head=False, window=5, softcap=2.0, head_softcap=2.0), 2, 16),
        (replace(SMALL, qk_norm=True, position="sinusoidal"), 2, 16),
        (replace(LLAMA, qk_norm=True, qkv_bias=True), 2, 16),
        (replace(SMALL, **DROPOUT), 2, 16),
        (replace(LLAMA, **DROPOUT), 2, 16),
        (GPTConfig(n_layer=1, n_head=2, d_model=64, vocab_size=128), 3, 7),
    ],
    ids=[
        "gpt2",
        "no_bias",
        "gelu_exact",
        "llama",
        "rms_relu2",
        "capped",
        "qk_norm",
        "qk_norm_rotary",
        "dropout",
        "dropout_rotary",
        "one_layer",
    ],
)
def test_activation_bytes_are_held_between_forward_and_backward(config, B, T, dtype):
    tokens = torch.randint(config.vocab_size, (B, T))
    for mode, row in RECOMPUTATIONS.items():
        if not row.fits(config):
            continue
        model = GPT(config, recompute=mode)
        working = working_copy(model, dtype)
        with Held(tokens, *model.parameters(), *working.parameters()) as held:
            loss = working(tokens, tokens)
        # The formula includes the tokens, which the caller keeps, but not the loss.
        kept = held.now - loss.nbytes + tokens.nbytes
        assert kept == activation_bytes(config, B, T, dtype.itemsize, mode), mode


def test_step_holds_gradients_of_all_weights_if_it_accumulates():
    config = PRESETS["gpt2"]
    weights = 4 * (parameters(config) + padding(config))
    parts = step_bytes(config, 8, 1024, 2, accumulates=True)
    assert parts["weights"] == weights
    assert parts["gradients"] == weights
    assert parts["optimizer"] == 2 * weights


def test_step_with_a_prefix_holds_only_its_gradients_and_two_moments_each():
    prefix = 20 * 12 * 2 * 768
    parts = step_bytes(PRESETS["gpt2"].with_prefix(20), 8, 1004, 4, accumulates=True)
    assert parts["gradients"] == 4 * prefix
    assert parts["optimizer"] == 2 * 4 * prefix


def test_step_without_accumulation_holds_no_gradients_at_its_fullest_moment():
    """The batch is large, so the fullest moment comes before the first gradient of a block."""
    assert step_bytes(PRESETS["gpt2"], 8, 1024, 4, accumulates=False)["gradients"] == 0


def test_step_holds_16_bit_copies_of_the_matrices():
    config = PRESETS["gpt2"]
    assert step_bytes(config, 8, 1024, 2, accumulates=True)["copies"] == 2 * matrices(config)
    assert step_bytes(config, 8, 1024, 4, accumulates=True)["copies"] == 0


def test_larger_batch_holds_more_bytes():
    config = PRESETS["gpt2"]
    eight = step_bytes(config, 8, 1024, 2, accumulates=True)
    nine = step_bytes(config, 9, 1024, 2, accumulates=True)
    assert sum(nine.values()) > sum(eight.values())
