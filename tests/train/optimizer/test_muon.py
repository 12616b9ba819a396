import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.model import PRESETS, GPTConfig
from tritium.train.optimizer import muon
from tritium.train.optimizer.muon import Muon, orthogonalize

pytestmark = pytest.mark.plain

OPTIONS = {"lr": 0.02, "weight_decay": 0.1}


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((8, 24), (24, 8), (8, 24), (8, 8))
    ]


def give_gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_match_those_of_pytorch(monkeypatch):
    monkeypatch.setattr(muon, "compute_dtype", lambda device: torch.bfloat16)
    ours, theirs = matrices(), matrices()
    optimizers = (
        Muon(ours, **OPTIONS),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **OPTIONS),
    )
    for step in range(5):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(parameters, step)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        # Both orthogonalize in bfloat16: a rounding of the momentum can change its last bit.
        torch.testing.assert_close(mine, other, rtol=0, atol=2 * OPTIONS["lr"] * 2**-8)
        torch.testing.assert_close(
            optimizers[0].state[mine]["momentum_buffer"],
            optimizers[1].state[other]["momentum_buffer"],
        )


def test_a_step_with_found_inf_changes_nothing():
    parameters = matrices()
    optimizer = Muon(parameters, **OPTIONS)
    give_gradients(parameters, 0)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    buffers = [optimizer.state[each]["momentum_buffer"] for each in parameters]
    before = [each.detach().clone() for each in (*parameters, *buffers)]
    for parameter in parameters:
        parameter.grad.fill_(torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for each, value in zip((*parameters, *buffers), before, strict=True):
        assert torch.equal(each, value)


def test_orthogonalized_matrices_keep_their_singular_vectors():
    matrices = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices)
    assert found.dtype == torch.float32
    for before, after in zip(matrices, found, strict=True):
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        inner = left.T @ after @ right.T
        torch.testing.assert_close(inner, inner.diag().diag(), rtol=0, atol=1e-5)
        assert inner.diag().min() > 0.6
        assert inner.diag().max() < 1.3
    # Tall matrices are transposed, and a matrix does not depend on the others.
    assert torch.equal(orthogonalize(matrices.mT), found.mT)
    torch.testing.assert_close(orthogonalize(matrices[1:2])[0], found[1])
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()


def test_a_learning_rate_in_a_tensor_gives_bitwise_the_same_weights():
    numbers, tensors = matrices(), matrices()
    for parameters, lr in ((numbers, 0.125), (tensors, torch.tensor(0.125))):
        optimizer = Muon(parameters, lr=lr)
        give_gradients(parameters, 0)
        optimizer.step()
    assert all(map(torch.equal, numbers, tensors))


def test_batches_are_limited(monkeypatch):
    monkeypatch.setattr(muon, "_MAX_BATCH_ELEMENTS", 2 * 8 * 24)
    parameters = [torch.nn.Parameter(torch.ones(8, 24)) for _ in range(5)]
    assert list(muon._batches(parameters)) == [[0, 1], [2, 3], [4]]
    monkeypatch.setattr(muon, "_MAX_BATCH_ELEMENTS", 8)
    assert list(muon._batches(parameters[:2])) == [[0], [1]]


def count_operators(model: GPTConfig, optimizer_class: type = Muon) -> int:
    """Count the operators of a step for the matrices of a model's blocks, without data."""
    D = model.d_model
    shapes = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)] * model.n_layer
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            is_sgd = func is torch.ops.aten._fused_sgd_.default
            if "view" not in str(func) and not torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeImplicitAutograd"
            ):
                counted.append(func)
            return None if is_sgd else func(*args, **kwargs or {})

    with torch.device("meta"):
        parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = optimizer_class(parameters)
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    with Count():
        optimizer.step()
    return len(counted)


def test_the_number_of_operators_does_not_grow_with_the_layers():
    deep = PRESETS["gpt2"]
    counts = [
        count_operators(GPTConfig(n_layer=layers, d_model=deep.d_model)) for layers in (2, 12)
    ]
    assert counts[0] == counts[1] < 160
    assert count_operators(deep, torch.optim.Muon) > 8 * counts[1]


def test_a_parameter_that_is_no_matrix_raises():
    vector = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"Muon: expected matrices, got .* of shape \(3,\)"):
        Muon([vector])
