import pytest
import torch

from tritium.kernels.core.dropout import (
    Dropout,
    drop,
    kept_elements,
    kept_tile,
    resolve_dropout,
    threshold_of,
)
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.philox import random_bits
from tritium.kernels.core.triton import HAS_TRITON, tl, triton


def options(dropout_p=0.25, seed=2**61 + 11, device="cpu"):
    return resolve_dropout("test", dropout_p, seed, torch.device(device))


@triton.jit
def _kept_kernel(kept_ptr, seed_ptr, M, N, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    kept = kept_tile(tl.load(seed_ptr), rows, first, N, threshold, BLOCK_M, BLOCK_N)
    columns = first + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(kept_ptr + rows[:, None] * N + columns[None, :], kept.to(tl.int8), mask=mask)


@pytest.mark.parametrize(("block_m", "block_n"), [(1, 4), (2, 16), (8, 32)])
@pytest.mark.parametrize("N", [1, 16, 31])
def test_kernels_and_references_keep_the_same_elements_for_any_tile(N, block_m, block_n, device):
    if not (HAS_TRITON and (INTERPRET or device.type == "cuda")):
        pytest.skip("runs a kernel: needs CUDA or TRITON_INTERPRET=1")
    M, dropout = 9, options(device=device)
    kept = torch.full((M, N), -1, dtype=torch.int8, device=device)
    grid = (triton.cdiv(M, block_m), triton.cdiv(N, block_n))
    arguments = {"seed_ptr": dropout.seed, "threshold": threshold_of(dropout.dropout_p)}
    _kept_kernel[grid](kept, M=M, N=N, BLOCK_M=block_m, BLOCK_N=block_n, **arguments)
    assert torch.equal(kept == 1, kept_elements(M, N, dropout))
    assert (kept >= 0).all()


@pytest.mark.plain
def test_element_takes_a_word_of_its_own():
    """Rows begin at a multiple of four words."""
    M, N, dropout = 3, 5, options()
    index = torch.arange(M)[:, None] * 8 + torch.arange(N)
    words = random_bits(dropout.seed, index)
    assert torch.equal(kept_elements(M, N, dropout), words >= threshold_of(dropout.dropout_p))


@pytest.mark.plain
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expected_fraction_and_the_mean(p):
    """Both are within five standard errors. Kept elements are divided by 1 - p."""
    M, N = 400, 250
    x = drop(torch.ones(M, N, dtype=torch.float64), options(p))
    kept = x != 0
    assert torch.equal(x[kept], torch.full_like(x[kept], 1 / (1 - p)))
    error = 5 * (p * (1 - p) / (M * N)) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < error
    assert abs(x.mean() - 1) < error / (1 - p)
    # Each row and column, and neighbors, which share a Philox counter.
    for axis, size in ((0, M), (1, N)):
        fractions = kept.double().mean(axis)
        assert (fractions - (1 - p)).abs().max() < 6 * (p * (1 - p) / size) ** 0.5
    both = (kept[:, 1:] & kept[:, :-1]).double().mean()
    assert abs(both - (1 - p) ** 2) < 3 * error


@pytest.mark.plain
@pytest.mark.parametrize("p", [2.0**-40, 1 - 2.0**-40])
def test_extreme_probabilities_give_finite_results(p):
    x = drop(torch.ones(50, 50), options(p))
    assert x.isfinite().all()
    assert bool((x != 0).all()) == (p < 0.5)


@pytest.mark.plain
def test_without_dropout_x_is_returned_and_no_seed_is_drawn():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    state = torch.random.get_rng_state()
    assert drop(x, options(0.0, None)) is x
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(Dropout().arguments.values()) == {None}


@pytest.mark.plain
def test_dropout_is_computed_in_at_least_float32():
    assert drop(torch.ones(2, 3, dtype=torch.bfloat16), options()).dtype == torch.float32
    assert drop(torch.ones(2, 3, dtype=torch.float64), options()).dtype == torch.float64


@pytest.mark.plain
def test_seed_may_be_a_number_a_tensor_or_drawn():
    assert torch.equal(options(seed=7).seed, torch.tensor(7))
    seed = torch.tensor(7)
    assert options(seed=seed).seed is seed
    torch.manual_seed(3)
    drawn = options(seed=None).seed
    assert not torch.equal(drawn, options(seed=None).seed)
    torch.manual_seed(3)
    assert torch.equal(drawn, options(seed=None).seed)


@pytest.mark.plain
def test_seeds_from_2_to_the_63_are_read_as_signed_bits():
    """torch.initial_seed() may return such a number."""
    assert options(seed=2**63 - 1).seed == 2**63 - 1
    assert options(seed=2**63 + 5).seed == -(2**63) + 5
    assert options(seed=2**64 - 1).seed == -1


@pytest.mark.plain
@pytest.mark.parametrize(
    ("p", "seed", "message"),
    [
        (1.0, 0, r"dropout_p must be in \[0, 1\), got 1.0"),
        (-0.1, 0, r"dropout_p must be in \[0, 1\), got -0.1"),
        (float("nan"), 0, r"dropout_p must be in \[0, 1\), got nan"),
        (0.1, 2**64, r"seed must be from -2\*\*63 to 2\*\*64 - 1, got 18446744073709551616"),
        (0.1, torch.zeros(1).long(), r"seed must be an int or a \(\) int64 tensor on cpu, got"),
        (0.1, torch.tensor(1.0), r"seed must be .* on cpu, got torch.float32 \(\) on cpu"),
        (0.1, torch.tensor(1, device="meta"), r"seed must be .* on cpu, got .* on meta"),
    ],
)
def test_bad_options_raise(p, seed, message):
    with pytest.raises(ValueError, match="^test: " + message):
        options(p, seed)
