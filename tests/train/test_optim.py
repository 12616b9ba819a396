import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.choices import OPTIMIZERS, check_optimizer
from tritium.train.config import TrainConfig
from tritium.train.distributed.engines import SingleProcess
from tritium.train.execution import resolve
from tritium.train.optim import Optimizer

pytestmark = pytest.mark.plain


@pytest.fixture
def model() -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 20, "context_tokens": 8}
    return GPT(GPTConfig(**shape, tied_head=False))


def make_optimizer(model: GPT, **options) -> Optimizer:
    config = TrainConfig.from_options(**options)
    return Optimizer(SingleProcess(model, resolve(config)), config)


def with_gradients(model: GPT) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for part in make_optimizer(model, weight_decay=0.3, optimizer=optimizer).parts:
        for group in part.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                assert name not in found
                found[name] = type(part).__name__
                assert group["weight_decay"] == (0.3 if parameter.ndim == 2 else 0.0), name
    assert set(found) == set(names.values())
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    matrices = {f"h.{layer}.{name}.weight" for layer in (0, 1) for name in linear}
    assert {name for name, owner in found.items() if owner == "Muon"} == (
        matrices if optimizer == "muon" else set()
    )


def test_a_parameter_in_no_group_raises(model, monkeypatch):
    original = torch.optim.AdamW

    def forgetful(groups, **options):
        return original([groups[0], groups[1] | {"params": groups[1]["params"][1:]}], **options)

    monkeypatch.setattr(torch.optim, "AdamW", forgetful)
    with pytest.raises(ValueError, match="expected each of 29 parameters once, got 28 in groups"):
        make_optimizer(model)


def test_muon_alone_trains_a_model_whose_trained_parameters_are_matrices(model):
    """As those of LoRA are."""
    matrices = {"h.0.mlp.c_fc.weight", "h.1.mlp.c_fc.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in matrices)
    (part,) = make_optimizer(model, optimizer="muon").parts
    assert sum(len(group["params"]) for group in part.param_groups) == 2


def test_frozen_parameters_are_in_no_group(model):
    model.wte.weight.requires_grad_(False)
    parts = make_optimizer(model).parts
    assert not any(
        model.wte.weight is held
        for part in parts
        for group in part.param_groups
        for held in group["params"]
    )


def test_an_adamw_step_matches_the_formula(model):
    """The first step, from zero moments: p (1 - lr wd) - lr g / (|g| + eps)."""
    optimizer = make_optimizer(model, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=0)
    weight = model.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    with_gradients(model)
    grad = weight.grad.clone()
    optimizer.update(0.01)
    torch.testing.assert_close(
        weight.detach(), before * (1 - 0.01 * 0.1) - 0.01 * grad / (grad.abs() + 1e-8)
    )
    state = optimizer.states()[weight]
    torch.testing.assert_close(state["exp_avg"], (1 - 0.9) * grad)
    torch.testing.assert_close(state["exp_avg_sq"], (1 - 0.99) * grad.square())


def test_muon_steps_have_the_size_of_adamw_steps(model):
    """The update is nearly orthogonal: singular values 0.5 to 1.5, root mean square about 0.2."""
    optimizer = make_optimizer(model, optimizer="muon", weight_decay=0.1, grad_clip=0)
    weight, gain = model.h[0].mlp.c_proj.weight, model.ln_f.weight
    before = weight.detach().clone(), gain.detach().clone()
    with_gradients(model)
    optimizer.update(0.01)
    change = (before[0] * (1 - 0.01 * 0.1) - weight.detach()) / 0.01
    singular = torch.linalg.svdvals(change / (0.2 * 64**0.5))
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    assert change.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)
    torch.testing.assert_close((gain.detach() - before[1]).abs(), torch.full_like(gain, 0.01))


def test_tensor_ranks_that_the_optimizer_does_not_support_raise():
    check_optimizer("muon")
    check_optimizer("adamw", tensor_ranks=2)
    with pytest.raises(InputError, match="expected adamw with 2 tensor ranks, got muon"):
        check_optimizer("muon", tensor_ranks=2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_block_matrices_has_the_bytes_of_the_row(name, model):
    optimizer = make_optimizer(model, optimizer=name)
    with_gradients(model)
    optimizer.update(0.01)
    weight = model.h[0].mlp.c_fc.weight
    tensors = [value for value in optimizer.states()[weight].values() if value.ndim]
    expected = OPTIMIZERS[name].block_matrix_state_bytes * weight.numel()
    assert sum(value.nbytes for value in tensors) == expected


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_are_clipped_by_their_global_norm_and_dropped(model, optimizer):
    optimizer = make_optimizer(model, optimizer=optimizer, grad_clip=0.5)
    kept = with_gradients(model)
    before = torch.cat([grad.flatten().clone() for grad in kept])
    norm = optimizer.update(0.25)
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(torch.cat([grad.flatten() for grad in kept]), before * 0.5 / norm)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.25}
