import pytest
import torch

from tritium.model import GPT, GPTConfig
from tritium.train.config import TrainConfig
from tritium.train.optim import make_optimizer, update

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
    weight = model.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grad = weight.grad.clone()
    update(optimizer, lr=0.01, grad_clip=0.0)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.1) - 0.01 * grad / (grad.abs() + 1e-8))


def test_gradients_are_clipped_by_their_norm_over_everything_and_dropped(model):
    optimizer = make_optimizer(model, TrainConfig())
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    kept = [parameter.grad for parameter in parameters]
    before = torch.cat([grad.flatten().clone() for grad in kept])
    norm = update(optimizer, lr=0.01, grad_clip=0.5)
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(torch.cat([grad.flatten() for grad in kept]), before * 0.5 / norm)
    assert all(parameter.grad is None for parameter in parameters)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
