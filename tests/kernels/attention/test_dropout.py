"""Dropout of attention weights: the mask of a seed, its statistics, and seeds."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.attention.cases import (
    DTYPES,
    assert_bitwise_equal,
    assert_matches_definition,
    attend,
    attend_lse,
    make_inputs,
    run,
)
from tritium.kernels import causal_attention, causal_attention_varlen
from tritium.kernels.core.op import INTERPRET
from tritium.kernels.core.philox import random_bits


def dropout_scale(p, seed, B, H, T, S, device):
    """1 / (1 - p) for the weights (b, h, i, j) to keep, 0 for the others."""
    words = 4 * -(-S // 4)
    index = torch.arange(B * H * T * words, device=device).view(B, H, T, words)[..., :S]
    kept = random_bits(torch.tensor(seed, device=device), index) >= p * 2**32 - 2**31
    return kept.double() / (1 - p)


@pytest.mark.parametrize(
    ("T", "S", "window", "dtype"),
    [
        *((30, 30, None, dtype) for dtype in DTYPES),
        *((140, 141, None, dtype) for dtype in (torch.float32, torch.bfloat16)),
        *((130, 139, 37, dtype) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_forward_and_backward_use_the_mask_of_the_seed(T, S, window, dtype, device):
    B, H, K, p, seed = 2, 2, 16, 0.25, 2**61 + 11
    q, k, v, *incoming = make_inputs(B, T, S, H, 1, K, dtype, device)
    options = {} if window is None else {"window": window}
    got = run(attend_lse(dropout_p=p, seed=seed, **options), (q, k, v), incoming)
    scale = dropout_scale(p, seed, B, H, T, S, device)
    assert_matches_definition(got, (q, k, v), incoming, dropout_scale=scale, **options)


def test_a_document_uses_the_mask_of_its_tokens(device):
    """Row i of the mask is for token i of all documents, column j for key j of its document."""
    H, N, p, seed, document = 2, 21, 0.25, 7, slice(9, 21)
    q, k, v, do, dlse = make_inputs(1, N, N, H, 1, 16, torch.float32, device)
    cu_seqlens = torch.tensor([0, 9, N], dtype=torch.int32, device=device)

    def attend_documents(*x):
        x = [each[0] for each in x]
        options = {"return_lse": True, "dropout_p": p, "seed": seed}
        return [y[None] for y in causal_attention_varlen(*x, cu_seqlens, 12, **options)]

    o, lse, *grads = run(attend_documents, (q, k, v), (do, dlse))
    got = [o[:, document], lse[..., document], *(grad[:, document] for grad in grads)]
    scale = dropout_scale(p, seed, 1, H, N, N, device)[:, :, document, :12]
    inputs = [x[:, document] for x in (q, k, v)]
    incoming = do[:, document], dlse[..., document]
    assert_matches_definition(got, inputs, incoming, dropout_scale=scale)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expected_fraction(p, device):
    """With equal scores and values of 1, query i returns kept keys / ((i + 1) (1 - p))."""
    T = 70 if INTERPRET else 200
    zeros, ones = torch.zeros(2, T, 2, 16, device=device), torch.ones(2, T, 2, 16, device=device)
    o = causal_attention(zeros, zeros, ones, dropout_p=p, seed=5)[..., 0]
    kept = (o * torch.arange(1, T + 1, device=device)[:, None] * (1 - p)).double().sum().item()
    pairs = 4 * T * (T + 1) / 2
    assert abs(kept / pairs - (1 - p)) < 5 * (p * (1 - p) / pairs) ** 0.5


@pytest.mark.plain
def test_mean_over_masks_matches_no_dropout():
    """The mean of 600 masks is within six standard errors, for o and each gradient.

    The mean is exact because o and its gradients are linear in the dropped weights.
    """
    q, k, v, do, _ = make_inputs(1, 6, 6, 1, 1, 4, torch.float64, "cpu")
    results = [run(attend(dropout_p=0.3, seed=seed), (q, k, v), [do]) for seed in range(600)]
    expected = run(attend(), (q, k, v), [do])
    for samples, mean in zip(zip(*results, strict=True), expected, strict=True):
        samples = torch.stack(samples)
        error = (samples.mean(0) - mean).abs()
        assert (error <= 6 * samples.std(0) / 600**0.5 + 1e-12).all()


def test_seed_determines_the_mask(device):
    q, k, v, *_ = make_inputs(1, 40, 40, 2, 2, 16, torch.float32, device)

    def drop(seed):
        return causal_attention(q, k, v, dropout_p=0.25, seed=seed)

    assert not torch.equal(drop(11), drop(12))
    assert torch.equal(drop(11), drop(torch.tensor(11, device=device)))
    torch.manual_seed(5)
    first = drop(None)
    assert not torch.equal(first, drop(None)), "each call draws its own seed"
    torch.manual_seed(5)
    assert torch.equal(first, drop(None))


@pytest.mark.parametrize("seed", [3, None], ids=["given", "drawn"])
def test_activation_checkpointing_repeats_the_mask(seed, device):
    q, k, v, do, _ = make_inputs(1, 40, 40, 2, 2, 16, torch.float32, device)
    drop = attend(dropout_p=0.25, seed=seed)
    torch.manual_seed(6)
    expected = run(drop, (q, k, v), [do])
    torch.manual_seed(6)
    got = run(lambda *x: checkpoint(drop, *x, use_reentrant=False), (q, k, v), [do])
    assert_bitwise_equal(got, expected)
