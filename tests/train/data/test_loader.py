"""Batches depend on the step only; each token but the first is a target once per epoch."""

import itertools

import numpy as np
import pytest
import torch

from tritium.errors import InputError
from tritium.kernels.embedding import order_of
from tritium.train.data.loader import (
    IGNORE_INDEX,
    Loader,
    document_starts,
    evaluation_batches,
    permute,
)
from tritium.train.data.shards import TokenStream

pytestmark = pytest.mark.plain


def _stream(n):
    """Tokens 0, 1, 2, ... (a token is its position) in four parts of different lengths."""
    return TokenStream(np.split(np.arange(n, dtype=np.uint32), sorted({n // 3, n // 3 + 1, n - 2})))


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 65, 1000])
def test_permutation_is_a_bijection(size):
    everything = np.arange(size)
    orders = {
        tuple(permute(everything, size, seed, epoch)) for seed in range(10) for epoch in range(10)
    }
    for order in orders:
        assert sorted(order) == list(range(size))
    # 100 permutations: all orders of up to 3 elements, no repeats for larger sizes.
    assert len(orders) == {1: 1, 2: 2, 3: 6}.get(size, 100)


def test_permutation_is_elementwise_and_takes_huge_sizes():
    np.testing.assert_array_equal(
        permute(np.arange(1000), 1000, 1, 2)[[7, 3]], permute(np.array([7, 3]), 1000, 1, 2)
    )
    size = 2**61 + 12345
    result = permute(np.array([0, 1, size - 1]), size, 0, 10**30)
    assert len(set(result.tolist())) == 3
    assert result.min() >= 0
    assert result.max() < size


def test_permutation_separates_neighbors():
    """|p(i) - p(i + 1)| of a random permutation has mean size / 3; the bar is 5 standard errors."""
    size = 30_000
    gaps = np.abs(np.diff(permute(np.arange(size), size, 3, 0)))
    assert abs(gaps.mean() / (size / 3) - 1) < 5 * 0.7 / size**0.5
    first, second = permute(np.arange(size), size, 3, 0), permute(np.arange(size), size, 3, 1)
    assert (first == second).sum() < 10  # Poisson distributed with mean 1


@pytest.mark.parametrize(
    ("n", "context"), [(1001, 10), (1002, 10), (1000, 10), (1009, 10), (11, 10), (12, 10), (500, 1)]
)
def test_every_token_is_a_target_once_per_epoch(n, context):
    loader = Loader(_stream(n), context_tokens=context, batch_size=1, seed=5)
    assert loader.windows == -(-(n - 1) // context)
    for epoch in range(2):
        seen = []
        for step in range(epoch * loader.windows, (epoch + 1) * loader.windows):
            tokens, targets = loader.batch(step).on("cpu")
            assert tokens.shape == targets.shape == (1, context)
            assert tokens.dtype == targets.dtype == torch.int64
            kept = targets != IGNORE_INDEX
            assert torch.equal(tokens[kept] + 1, targets[kept])
            assert tokens[~kept].tolist() == [n - 1, *[0] * (context - 1)][: int((~kept).sum())]
            seen += targets[kept].tolist()
        assert sorted(seen) == list(range(1, n))


def test_a_batch_may_span_two_epochs():
    loader = Loader(_stream(101), context_tokens=10, batch_size=4, seed=0)  # 10 windows, 4 per step
    starts = [row[0].item() // 10 for step in range(5) for row in loader.batch(step).inputs]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(10))
    assert starts[:10] != starts[10:]


def test_batch_larger_than_an_epoch_repeats_windows():
    loader = Loader(_stream(21), context_tokens=10, batch_size=6, seed=0)
    assert sorted(loader.batch(3).inputs[:, 0].tolist()) == [0, 0, 0, 10, 10, 10]


def test_batches_do_not_depend_on_earlier_calls():
    steps = [0, 1, 7, 300, 299, 5000, 10**9, 10**20, 3]
    one = Loader(_stream(5000), context_tokens=8, batch_size=4, seed=1)
    expected = {step: one.batch(step) for step in steps}
    for step in reversed(steps):
        fresh = Loader(_stream(5000), context_tokens=8, batch_size=4, seed=1)
        for loader in (one, fresh):
            assert torch.equal(loader.batch(step).windows, expected[step].windows)
    other_seed = Loader(_stream(5000), context_tokens=8, batch_size=4, seed=2)
    assert not torch.equal(other_seed.batch(0).windows, expected[0].windows)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_int64_copies_do_not_change_the_batch(dtype):
    stream = TokenStream([np.arange(60_000, 60_025).astype(dtype)])
    batch = Loader(stream, context_tokens=10, batch_size=3, seed=1).batch(0)
    assert len(batch) == 3
    before = batch.windows.clone()
    for start in range(3):
        row = batch[start : start + 1]
        tokens, targets = row.on("cpu")
        assert tokens.is_contiguous()
        assert targets.is_contiguous()
        assert (targets != IGNORE_INDEX).sum() == row.num_targets.sum() in (10, 4)
        assert torch.equal(tokens[0, 1 : row.num_targets[0]], targets[0, : row.num_targets[0] - 1])
        assert tokens[0, 0] in (60_000, 60_010, 60_020)
        tokens.zero_()
        targets.zero_()
    assert torch.equal(batch.windows, before)
    assert batch.windows.numpy().dtype == dtype


@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_of_all_ranks_are_the_batch_of_one_rank(world_size):
    sizes = {"context_tokens": 8, "batch_size": 6, "seed": 9}
    single = Loader(_stream(1000), **sizes)
    ranks = [
        Loader(_stream(1000), **sizes, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (*range(25), 10**9):
        parts = [loader.batch(step) for loader in ranks]
        assert all(part.inputs.shape == (6 // world_size, 8) for part in parts)
        assert torch.equal(torch.cat([part.windows for part in parts]), single.batch(step).windows)
    rows = [
        {int(row[0]) for step in range(20) for row in loader.batch(step).inputs} for loader in ranks
    ]  # within one epoch
    for one, other in itertools.combinations(rows, 2):
        assert not one & other


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("sorted_rows", [1, 2, 6])
def test_order_of_each_micro_batch_is_bitwise_the_sort_of_its_inputs(sorted_rows, dtype):
    generator = np.random.default_rng(0)
    stream = TokenStream([generator.integers(0, 9, 1000).astype(dtype)])
    sizes = {"context_tokens": 8, "batch_size": 12, "seed": 9, "world_size": 2}
    for rank in range(2):
        loader = Loader(stream, **sizes, rank=rank, sorted_rows=sorted_rows)
        plain = Loader(stream, **sizes, rank=rank)
        for step in (0, 1, 30, 10**9):
            batch = loader.batch(step)
            assert torch.equal(batch.windows, plain.batch(step).windows)
            for start in range(0, 6, sorted_rows):
                part = batch[start : start + sorted_rows]
                tokens, _ = part.on("cpu")
                assert part.token_order.dtype == torch.int32
                assert torch.equal(part.token_order.long(), order_of(tokens))


def test_rows_that_are_not_a_sorted_group_have_no_order():
    batch = Loader(_stream(1000), context_tokens=8, batch_size=6, seed=9, sorted_rows=2).batch(0)
    assert batch.token_order is None
    assert batch[:4].token_order is None
    assert batch[1:3].token_order is None
    assert batch[2:6][:2].token_order is not None
    unsorted = Loader(_stream(1000), context_tokens=8, batch_size=6, seed=9).batch(0)
    assert unsorted[:2].token_order is None


def test_impossible_sizes_raise():
    sizes = {"context_tokens": 10, "batch_size": 6, "seed": 0}
    with pytest.raises(InputError, match="multiple of the 4 ranks, got 6; take 4"):
        Loader(_stream(100), **sizes, world_size=4)
    with pytest.raises(
        InputError, match="context_tokens 10 needs 11 training tokens or more, got 10"
    ):
        Loader(_stream(10), **sizes)
    with pytest.raises(InputError, match="at least 1, got 0 and 10"):
        Loader(_stream(100), context_tokens=10, batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        Loader(_stream(100), **sizes, rank=2, world_size=2)


# --- evaluation


@pytest.mark.parametrize("n", [2, 7, 11, 101, 105, 110])
def test_evaluation_reads_every_token_in_order(n):
    stream = TokenStream([np.arange(n, dtype=np.uint16)])
    batches = [
        batch.on("cpu") for batch in evaluation_batches(stream, context_tokens=10, batch_size=4)
    ]
    targets = torch.cat([targets for _, targets in batches])
    assert targets.shape == (-(-(n - 1) // 10), 10)
    assert targets[targets != IGNORE_INDEX].tolist() == list(range(1, n))
    inputs = torch.cat([tokens for tokens, _ in batches])
    assert inputs[targets != IGNORE_INDEX].tolist() == list(range(n - 1))
    assert [len(tokens) for tokens, _ in batches[:-1]] == [4] * (len(batches) - 1)


def test_evaluation_reads_at_most_max_tokens_spread_evenly():
    def count(max_tokens):
        batches = evaluation_batches(
            _stream(1000), context_tokens=10, batch_size=4, max_tokens=max_tokens
        )
        return sum(int(batch.num_targets.sum()) for batch in batches)

    assert [count(limit) for limit in (1, 10, 59, 60, 10**9)] == [10, 10, 50, 60, 999]
    (spread,) = evaluation_batches(_stream(1000), context_tokens=10, batch_size=8, max_tokens=50)
    assert spread.inputs[:, 0].tolist() == [0, 200, 400, 600, 800]
    with pytest.raises(InputError, match=r"at least 2 tokens, got 1; .* a larger `held_out`"):
        next(
            evaluation_batches(
                TokenStream([np.zeros(1, np.uint16)]), context_tokens=10, batch_size=4
            )
        )


def test_documents_start_at_rows_and_separators():
    tokens = torch.tensor([[7, 1, 9, 2, 9], [9, 9, 3, 4, 5]])
    cu_seqlens = document_starts(tokens, 9)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 2, 4, 5, 6, 10, 10, 10, 10]
    assert document_starts(tokens[:1], 8).tolist() == [0, 5, 5], "at least two documents"
    assert document_starts(tokens, 8).tolist() == [0, 5, 10]
    assert tokens[0, 0] == 7, "the batch is unchanged"
    for documents in range(1, 20):
        row = torch.zeros(1, 40, dtype=torch.int64)
        row[0, 1:documents] = 9
        starts = document_starts(row, 9)
        assert (len(starts) - 1).bit_count() == 1
        assert starts.diff()[:documents].min() > 0
        assert starts.unique().numel() == documents + 1


@pytest.mark.parametrize("n", [1001, 1005])
def test_num_targets_counts_all_ranks_without_padding(n):
    loaders = [
        Loader(_stream(n), context_tokens=10, batch_size=6, seed=5, rank=rank, world_size=3)
        for rank in range(3)
    ]
    for step in range(40):  # 2 epochs of 100 or 101 windows; the last may be padded
        found = sum(int(loader.batch(step).num_targets.sum()) for loader in loaders)
        assert [loader.num_targets(step) for loader in loaders] == [found] * 3


@pytest.mark.parametrize(
    ("n", "batch_size", "max_tokens"),
    [(1005, 4, None), (1005, 40, None), (1005, 4, 300), (95, 4, None)],
)
def test_ranks_evaluate_each_target_once_in_equally_many_batches(n, batch_size, max_tokens):
    options = {"context_tokens": 10, "max_tokens": max_tokens}
    (single,) = evaluation_batches(_stream(n), batch_size=1000, **options)
    parts = [
        list(evaluation_batches(_stream(n), batch_size=batch_size, rank=r, world_size=3, **options))
        for r in range(3)
    ]
    assert len({len(part) for part in parts}) == 1
    targets = torch.cat([batch.on("cpu")[1].flatten() for part in parts for batch in part])
    expected = single.on("cpu")[1].flatten()
    assert torch.equal(
        targets[targets != IGNORE_INDEX].sort().values,
        expected[expected != IGNORE_INDEX].sort().values,
    )
