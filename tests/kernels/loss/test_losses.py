"""Both losses of the same logits: four public bugs of other libraries' losses."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import assert_close, assert_equal
from tritium import kernels
from tritium.kernels.core.op import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="the kernels do not take part in what is tested")


def losses(logits, target, **options):
    """Both losses of the same logits."""
    weight = torch.eye(logits.shape[-1], device=logits.device)
    return (
        kernels.cross_entropy(logits, target, **options),
        kernels.linear_cross_entropy(logits, weight, target, **options),
    )


@pytest.fixture
def logits_and_target(device):
    target = torch.tensor([1, -100, 4, 0, -100, 2], device=device)
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(device), target


def test_gradients_without_a_reduction_use_each_rows_own_factor(logits_and_target):
    logits, target = logits_and_target
    incoming = torch.arange(1.0, 7.0, device=logits.device)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        F.cross_entropy(leaf, target, reduction="none"), leaf, incoming
    )
    for loss in losses(leaf, target, reduction="none"):
        assert_close(torch.autograd.grad(loss, leaf, incoming), [expected], rtol=1e-4, atol=1e-6)


def test_compiled_losses_with_ignored_rows_match_torch(logits_and_target):
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    expected = F.cross_entropy(*logits_and_target)
    assert_close(compiled(*logits_and_target), [expected] * 2)


def test_losses_run_without_gradients(logits_and_target):
    logits, target = logits_and_target
    expected = losses(logits, target)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_equal(losses(logits.requires_grad_(), target), expected)


def test_losses_do_not_depend_on_whether_logits_need_a_gradient(logits_and_target):
    logits, target = logits_and_target
    expected = [loss.detach() for loss in losses(logits.clone().requires_grad_(), target)]
    assert_equal(losses(logits, target), expected)
    assert all(loss > 0 for loss in expected)
