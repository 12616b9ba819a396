"""The loss of a block of rows and its gradient, which the references of both losses share."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.loss.cases import ALL_OPTIONS
from tritium.kernels.loss.block_loss import (
    apply_weights,
    block_dlogits,
    block_loss,
    cap_logits,
    reduce_losses,
    row_blocks,
    row_weights,
)
from tritium.kernels.loss.options import LossOptions

pytestmark = pytest.mark.plain


def logits_and_columns(M=6, V=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(M, V, generator=generator, dtype=dtype)
    return logits, torch.randint(V, (M,), generator=generator)


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(**ALL_OPTIONS)])
def test_gradient_matches_autograd_of_the_loss(options):
    logits, index = logits_and_columns()
    scale = torch.linspace(-1, 2, 6, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    s = options.softcap * torch.tanh(leaf / options.softcap) if options.softcap else leaf
    (expected,) = torch.autograd.grad(block_loss(s, index, options)[0], leaf, scale)
    s = cap_logits(logits, options.softcap)
    _, top, log_sum, p = block_loss(s, index, options)
    got = block_dlogits(p, s, index, top + log_sum, scale, options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_loss_with_all_options_matches_torch():
    logits, index = logits_and_columns()
    options = LossOptions(label_smoothing=0.1, z_loss=0.01, softcap=3.0)
    s = 3 * torch.tanh(logits / 3)
    smooth = F.cross_entropy(s, index, label_smoothing=0.1, reduction="none")
    loss, top, log_sum, p = block_loss(cap_logits(logits, 3.0), index, options)
    torch.testing.assert_close(top, s.amax(-1))
    torch.testing.assert_close(top + log_sum, s.logsumexp(-1))
    torch.testing.assert_close(p, s.softmax(-1))
    torch.testing.assert_close(loss, smooth + 0.01 * s.logsumexp(-1) ** 2)


def test_gradient_keeps_its_digits_if_the_target_has_probability_one():
    """In float32 the subtraction p - 1 would give 0."""
    logits = torch.tensor([[20.0, 0.0, 0.0]])
    index = torch.tensor([0])
    _, top, log_sum, p = block_loss(logits, index, LossOptions())
    got = block_dlogits(p, logits, index, top + log_sum, torch.ones(1), LossOptions())
    expected = logits.double().softmax(-1) - torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_large_and_infinite_logits_match_torch():
    logits = torch.tensor([[1e4, 1e4 + 1, -float("inf")], [-1e4, -1e4, -1e4]])
    index = torch.tensor([0, 2])
    loss, top, log_sum, _ = block_loss(logits, index, LossOptions())
    torch.testing.assert_close(loss, F.cross_entropy(logits, index, reduction="none"))
    torch.testing.assert_close(top + log_sum, logits.logsumexp(-1))


def test_cap_logits_copies_only_if_it_changes_them():
    logits = torch.randn(2, 3)
    assert cap_logits(logits, 0.0) is logits
    before = logits.clone()
    assert cap_logits(logits, 1.0).abs().max() < 1
    assert torch.equal(logits, before)
    assert cap_logits(logits.bfloat16(), 0.0).dtype == torch.float32


@pytest.mark.parametrize("N", [0, 1, 7, 8, 9])
def test_row_blocks_cover_each_row_once(N):
    assert [i for rows in row_blocks(N, 4) for i in range(N)[rows]] == list(range(N))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_row_weights_are_one_or_zero_if_ignored_or_nan_if_invalid(dtype):
    target = torch.tensor([0, 4, -100, 5, -1], dtype=dtype)
    index, weight = row_weights(target, 5, -100, torch.float32)
    assert index.dtype == torch.int64
    assert index.tolist() == [0, 4, 0, 4, 0]
    assert weight[:3].tolist() == [1, 1, 0]
    assert weight[3:].isnan().all()


def test_ignore_index_may_be_a_column():
    assert row_weights(torch.tensor([2, 3]), 5, 2, torch.float32)[1].tolist() == [0, 1]


def test_reductions_leave_out_ignored_rows():
    weight = torch.tensor([1.0, 0.0, 1.0])
    loss = torch.tensor([1.0, float("nan"), 4.0])
    assert apply_weights(loss, weight).tolist() == [1, 0, 4]
    assert [value.item() for value in reduce_losses(loss, weight, "mean")] == [2.5, 2]
    assert [value.item() for value in reduce_losses(loss, weight, "sum")] == [5, 1]
    assert [value.tolist() for value in reduce_losses(loss, weight, "none")] == [[1, 0, 4], 1]
    assert [value.item() for value in reduce_losses(loss, 0 * weight, "mean")] == [0, 1]
