import pytest
import torch

from tritium.model import GPT, GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.optim import make_optimizer, set_learning_rate

pytestmark = pytest.mark.plain


@pytest.fixture
def model() -> GPT:
    return GPT(GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=20, context_tokens=8))


def test_matrices_decay_and_vectors_do_not(model):
    decayed, undecayed = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in undecayed["params"])
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))


def test_a_step_is_adamw(model):
    """Against the formula, for one step from zero moments: p (1 - lr wd) - lr g / (|g| + eps)."""
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1, beta1=0.9, beta2=0.99))
    set_learning_rate(optimizer, 0.01)
    weight = model.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    expected = before * (1 - 0.01 * 0.1) - 0.01 * weight.grad / (weight.grad.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected)
