"""What cross_entropy and linear_cross_entropy share; the checks are tested where they are public."""

import pytest
import torch
import torch.nn.functional as F

from tritium.kernels.loss._rows import (
    Options,
    block_dlogits,
    block_loss,
    blocks,
    capped,
    check_targets,
    empty_gradient,
    reduced,
    row_weights,
    weighted,
)

pytestmark = pytest.mark.plain
EVERYTHING = Options(ignore_index=-100, label_smoothing=0.1, z_loss=0.01, softcap=3.0)
NOTHING = Options(ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0)


def logits_and_columns(M=6, V=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(M, V, generator=generator, dtype=dtype), torch.randint(
        V, (M,), generator=generator
    )


@pytest.mark.parametrize("options", [NOTHING, EVERYTHING])
def test_gradient_of_a_block_is_that_of_its_loss(options):
    logits, index = logits_and_columns()
    scale = torch.linspace(-1, 2, 6, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    s = options.softcap * torch.tanh(leaf / options.softcap) if options.softcap else leaf
    (expected,) = torch.autograd.grad(block_loss(s, index, options)[0], leaf, scale)
    s = capped(logits, options.softcap)
    _, top, log_sum, p = block_loss(s, index, options)
    got = block_dlogits(p, s, index, top + log_sum, scale, options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_loss_of_a_block_is_what_its_formula_says():
    logits, index = logits_and_columns()
    s = 3 * torch.tanh(logits / 3)
    smooth = F.cross_entropy(s, index, label_smoothing=0.1, reduction="none")
    loss, top, log_sum, p = block_loss(capped(logits, 3.0), index, EVERYTHING)
    torch.testing.assert_close(top, s.amax(-1))
    torch.testing.assert_close(top + log_sum, s.logsumexp(-1))
    torch.testing.assert_close(p, s.softmax(-1))
    torch.testing.assert_close(loss, smooth + 0.01 * s.logsumexp(-1) ** 2)


def test_gradient_of_a_certain_target_keeps_its_digits():
    """p - 1, computed as that, would be 0 in float32."""
    logits, index = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([0])
    _, top, log_sum, p = block_loss(logits, index, NOTHING)
    got = block_dlogits(p, logits, index, top + log_sum, torch.ones(1), NOTHING)
    expected = logits.double().softmax(-1) - torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_logits_far_from_zero_and_minus_infinity():
    logits = torch.tensor([[1e4, 1e4 + 1, -float("inf")], [-1e4, -1e4, -1e4]])
    loss, top, log_sum, _ = block_loss(logits, torch.tensor([0, 2]), NOTHING)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, torch.tensor([0, 2]), reduction="none")
    )
    torch.testing.assert_close(top + log_sum, logits.logsumexp(-1))


def test_capped_copies_only_where_it_must():
    logits = torch.randn(2, 3)
    assert capped(logits, 0.0) is logits
    before = logits.clone()
    assert capped(logits, 1.0).abs().max() < 1
    assert torch.equal(logits, before)
    assert capped(logits.bfloat16(), 0.0).dtype == torch.float32


def test_blocks_cover_each_row_once():
    for N in (0, 1, 7, 8, 9):
        assert [
            i for rows in blocks(torch.empty(N, 2), lambda N, V: 4, 2) for i in range(N)[rows]
        ] == list(range(N))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_weights_of_rows(dtype):
    index, weight = row_weights(
        torch.tensor([0, 4, -100, 5, -1], dtype=dtype), 5, -100, torch.float32
    )
    assert index.dtype == torch.int64
    assert index.tolist() == [0, 4, 0, 0, 0]
    assert weight[:3].tolist() == [1, 1, 0]
    assert weight[3:].isnan().all()
    assert row_weights(torch.tensor([2, 3]), 5, 2, torch.float32)[1].tolist() == [0, 1], (
        "a column can be ignored"
    )


def test_ignored_rows_never_count():
    weight = torch.tensor([1.0, 0.0, 1.0])
    loss = torch.tensor([1.0, float("nan"), 4.0])
    assert weighted(loss, weight).tolist() == [1, 0, 4]
    assert [value.item() for value in reduced(loss, weight, "mean")] == [2.5, 2]
    assert [value.item() for value in reduced(loss, weight, "sum")] == [5, 1]
    assert [value.tolist() for value in reduced(loss, weight, "none")] == [[1, 0, 4], 1]
    assert [value.item() for value in reduced(loss, 0 * weight, "mean")] == [0, 1]


def test_a_gradient_begins_its_rows_where_the_logits_do():
    """Equally far from a multiple of 16 bytes: the kernels load and store both 16 bytes at a time."""
    base = torch.empty(6, 40, dtype=torch.bfloat16)
    for V, logits in (
        (40, base),
        (33, base[:, :33]),
        (40, base[::2]),
        (33, torch.empty(6, 33)),
        (9, base[:1, :9].expand(6, 9)),
    ):
        gradient = empty_gradient(logits)
        assert gradient.shape == logits.shape
        assert gradient.dtype == logits.dtype
        assert V <= gradient.stride(0) < V + 16 // logits.itemsize
        assert (gradient.stride(0) - logits.stride(0)) * logits.itemsize % 16 == 0


def test_bad_targets_are_looked_for_only_where_that_is_free():
    with pytest.raises(
        IndexError,
        match=r"op: target must be from 0 to 4 or ignore_index \(-100\), got 5 and 1 more; ",
    ):
        check_targets("op", torch.tensor([0, 5, -1, -100]), 5, -100)
    check_targets("op", torch.tensor([0, 4, -100]), 5, -100)
    check_targets("op", torch.full((3,), 9, device="meta"), 5, -100)
