import pytest
import torch

from tritium.train.muon import Muon

pytestmark = pytest.mark.plain

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 24), (24, 8))
    ]


def give_gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_match_those_of_pytorch(nesterov):
    ours, theirs = matrices(), matrices()
    optimizers = (
        Muon(ours, nesterov=nesterov, **OPTIONS),
        torch.optim.Muon(theirs, nesterov=nesterov, **OPTIONS),
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
