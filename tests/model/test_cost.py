from dataclasses import replace

import pytest
import torch

from tests.held import Held
from tritium.model import GPT, PRESETS, GPTConfig
from tritium.model.cost import activation_bytes, flops_per_token, matrices, parameters, step_bytes
from tritium.model.recompute import RECOMPUTATIONS
from tritium.train.precision import working_copy

pytestmark = pytest.mark.plain

SMALL = GPTConfig(n_layer=3, n_head=4, d_model=32, vocab_size=100, context_tokens=16, n_kv_head=2)
LLAMA = replace(SMALL, position="rotary", norm="rms", mlp="swiglu", bias=False)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *[
            ("gpt2", 124_439_808),
            ("gpt2-medium", 354_823_168),
            ("gpt2-large", 774_030_080),
            ("gpt2-xl", 1_557_611_200),
        ],
        ("llama-124m", 123_551_232),
    ],
)
def test_presets_have_their_published_parameters(name, count):
    assert parameters(PRESETS[name]) == count


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, bias=False),
        PRESETS["gpt2"],
        LLAMA,
        replace(LLAMA, bias=True),
        PRESETS["llama-124m"],
    ],
)
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = GPT(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.d_model
    assert sum(parameter.numel() for parameter in model.parameters()) - padding == parameters(
        config
    )


def test_flops_are_counted_as_for_mfu():
    # 6 (124,439,808 - 1024 * 768) + 12 * 12 * 768 * 1024: 0.855 GFLOP a token.
    assert flops_per_token(PRESETS["gpt2"], 1024) == 6 * 123_653_376 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("config", "B", "T"),
    [
        (SMALL, 2, 16),
        (replace(SMALL, bias=False), 2, 16),
        (LLAMA, 2, 16),
        (replace(SMALL, norm="rms"), 2, 16),
        (GPTConfig(n_layer=1, n_head=2, d_model=64, vocab_size=128), 3, 7),
    ],
)
def test_activation_bytes_are_those_held_between_forward_and_backward(config, B, T, dtype):
    tokens = torch.randint(config.vocab_size, (B, T))
    for mode in RECOMPUTATIONS:
        if mode == "gelu" and config.mlp != "gelu":
            continue
        model = GPT(config, recompute=mode)
        working = working_copy(model, dtype)
        with Held(tokens, *model.parameters(), *working.parameters()) as seen:
            loss = working(tokens, tokens)
        kept = seen.now - loss.nbytes + tokens.nbytes
        assert kept == activation_bytes(config, B, T, dtype.itemsize, mode)


def test_a_step_holds_all_gradients_if_it_accumulates_and_copies_in_16_bits():
    """What a whole step allocates is compared with a measurement in tests/train/test_plan.py."""
    config = PRESETS["gpt2"]
    padded = 4 * (
        parameters(config) + (config.padded_vocab_size - config.vocab_size) * config.d_model
    )
    parts = step_bytes(config, 8, 1024, 2, accumulates=True)
    assert parts["weights"] == parts["gradients"] == parts["optimizer"] / 2 == padded
    assert parts["copies"] == 2 * matrices(config)
    assert step_bytes(config, 8, 1024, 4, accumulates=False)["gradients"] == 0
    assert sum(step_bytes(config, 9, 1024, 2, accumulates=True).values()) > sum(parts.values())
