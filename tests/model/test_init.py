"""Initial weights."""

import math

import pytest
import torch

from tritium.model import GPT, GPTConfig

pytestmark = pytest.mark.plain


def test_initial_weights_follow_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=2, d_model=64, vocab_size=256, context_tokens=64))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            # The measured deviation of n normal numbers has a relative standard error of
            # 1 / sqrt(2 n). Allow five of them.
            tolerance = 5 / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() / expected - 1) < tolerance, name


def test_same_seed_gives_the_same_weights():
    config = GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=16, context_tokens=4)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(GPT(config))
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)
