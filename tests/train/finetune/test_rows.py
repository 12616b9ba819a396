import numpy as np
import pytest
import torch

from tritium.model import GPT, GPTConfig
from tritium.train.finetune.rows import Counts, Example, make_rows, pack

pytestmark = pytest.mark.plain

SHAPE = GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=30, context_tokens=12)


def examples(*lengths: int) -> list[Example]:
    """Examples of random tokens; the second half of each is the answer."""
    draw = np.random.default_rng(0)
    return [
        Example(draw.integers(1, 30, length).astype(np.int32), np.arange(length) >= length // 2)
        for length in lengths
    ]


def test_packing_fills_rows_and_loses_nothing():
    lengths = np.random.default_rng(1).integers(1, 40, 500).tolist()
    groups = pack(lengths, 40)
    assert sorted(item for group in groups for item in group) == list(range(500))
    used = [sum(lengths[item] for item in group) for group in groups]
    assert max(used) <= 40
    assert len(groups) <= sum(lengths) / 40 * 1.05, "at most 5% of the rows is padding"
    assert pack([], 40) == []


def test_targets_are_the_next_tokens_of_answers():
    (example,) = examples(6)
    rows = make_rows([example], 8)
    assert rows.tokens[0].tolist() == [*example.tokens[:-1], 0, 0, 0]
    assert rows.targets[0].tolist() == [-100, -100, *example.tokens[3:], -100, -100, -100]
    assert rows.is_start[0].nonzero()[:, 0].tolist() == [0, 5]
    assert rows.num_targets.tolist() == [3]
    assert make_rows([example], None).tokens.shape == (1, 5)


def test_packed_and_separate_examples_give_the_same_loss_and_gradients():
    found = []
    given = examples(9, 4, 5, 12, 3, 7)
    for width in (12, None):
        torch.manual_seed(0)
        model = GPT(SHAPE).double()
        rows = make_rows(given, width)
        loss = model(**rows.model_inputs(torch.device("cpu")))
        loss.backward()
        found.append((loss, [each.grad for each in model.parameters()]))
    assert len(make_rows(given, 12)) < len(given)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)  # a float32 mean
    for packed, separate in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-12)


def test_tokens_that_are_no_targets_have_exactly_no_gradient():
    """The gradient of the logits at a masked position is zero, and so is that of its row of y."""
    model = GPT(SHAPE)
    rows = make_rows(examples(9, 4, 5), 12)
    inputs = rows.model_inputs(torch.device("cpu"))
    targets = inputs.pop("targets").flatten()
    y, head = model.hidden(**inputs)
    y.retain_grad()
    model.losses(y, head, targets, reduction="mean").backward()
    is_masked = targets == -100
    assert y.grad[is_masked].eq(0).all()
    assert y.grad[~is_masked].ne(0).any(1).all()
    # A token that is only a masked target gets no gradient through the head.
    torch.manual_seed(0)
    untied = GPT(GPTConfig(**{**vars(SHAPE), "tied_head": False}))
    untied(**rows.without_targets().model_inputs(torch.device("cpu"))).backward()
    assert all(each.grad.eq(0).all() for each in untied.parameters())


def test_examples_longer_than_a_row_lose_their_end_and_are_counted():
    counts = Counts()
    kept = counts.cut(examples(9, 30, 5), 8)
    assert [len(each) for each in kept] == [8, 4], "30 tokens have no answer among the first 9"
    assert counts == Counts(shortened=0, left_out=1)
    kept = counts.cut(examples(16), 8)
    assert [len(each) for each in kept] == [8]
    assert kept[0].is_answer.tolist() == [False] * 8 + [True]
    assert counts == Counts(shortened=1, left_out=1)


def test_a_batch_of_rows_has_its_documents():
    rows = make_rows(examples(7, 6, 12, 4), 12)
    assert len(rows) == 3
    device = torch.device("cpu")
    one = rows[np.array([1])].model_inputs(device, dropout_seed=3)
    assert one["dropout_seed"].item() == 3
    assert one["tokens"].shape == (1, 12)
    assert one["cu_seqlens"][0] == 0
    assert one["cu_seqlens"][-1] == 12
    assert rows.without_targets().num_targets.tolist() == [0, 0, 0]
