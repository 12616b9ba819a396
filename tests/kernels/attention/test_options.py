"""The options of causal attention: defaults and checks."""

import pytest
import torch

from tritium.kernels.attention.options import AttentionOptions, resolve_options

pytestmark = pytest.mark.plain
CPU = torch.device("cpu")
DEFAULTS = {"scale": None, "window": None, "softcap": 0.0, "dropout_p": 0.0, "seed": None}


def resolve(head_size=16, **options):
    return resolve_options("causal_attention", head_size, 10, CPU, **DEFAULTS | options)


def test_defaults_are_filled_in():
    assert resolve() == AttentionOptions(scale=0.25, window=10)


def test_window_is_at_most_the_number_of_keys():
    assert resolve(window=4).window == 4
    assert resolve(window=4000).window == 10


def test_seed_is_ignored_without_dropout():
    assert resolve(seed=3).seed is None


def test_seed_becomes_an_int64_tensor():
    seed = resolve(seed=2**61 + 11, dropout_p=0.1).seed
    assert (seed.dtype, seed.shape, seed.item()) == (torch.int64, (), 2**61 + 11)
    assert resolve(seed=seed, dropout_p=0.1).seed is seed


def test_default_seed_comes_from_pytorchs_generator():
    torch.manual_seed(5)
    first = resolve(dropout_p=0.1).seed
    assert resolve(dropout_p=0.1).seed != first
    torch.manual_seed(5)
    assert resolve(dropout_p=0.1).seed == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_size": 257}, "the head size must be from 1 to 256, got 257"),
        ({"head_size": 0}, "the head size must be from 1 to 256, got 0"),
        ({"scale": 0.0}, r"scale must be None \(1 / sqrt\(K\)\) or positive and finite, got 0.0"),
        ({"window": 0}, r"window must be None or at least 1 key \(a query sees itself\), got 0"),
        ({"softcap": -1.0}, r"softcap must be None, 0 \(none\) or positive and finite, got -1.0"),
        ({"softcap": float("inf")}, "softcap must be .* got inf"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        (
            {"seed": torch.tensor(3.0), "dropout_p": 0.1},
            r"seed must be an int or a \(\) int64 tensor on cpu, got torch.float32 \(\) on cpu",
        ),
    ],
)
def test_bad_option_raises(change, message):
    with pytest.raises(ValueError, match="^causal_attention: " + message):
        resolve(**change)
