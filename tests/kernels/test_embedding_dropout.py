"""Dropout in embedding."""

import sys

import pytest
import torch

from tests.kernels.compare import assert_equal
from tests.kernels.mlp.cases import saved_shapes
from tests.tolerance import assert_accurate
from tritium.kernels.core.dropout import Dropout, kept_elements
from tritium.kernels.embedding import embedding, launch_fwd

MODULE = sys.modules[launch_fwd.__module__]
NAMES = ["y", "dweight", "dposition_weight"]
P, SEED = 0.25, 2**61 + 11


def tensors(B, T, V, D, dtype, device):
    """Return tokens, a weight, a position weight of T + 2 rows, and an incoming gradient."""
    generator = torch.Generator().manual_seed(T * 1009 + V)
    tokens = torch.randint(V, (B, T), generator=generator)
    values = [
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((V, D), (T + 2, D), (B, T, D))
    ]
    return tokens.to(device), *values


def run(function, tokens, weight, table, dy, **options):
    """Return y, and the gradients of both tables."""
    leaves = [value.detach().requires_grad_() for value in (weight, table)]
    y = function(tokens, leaves[0], position_weight=leaves[1], **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def drop(*inputs, **options):
    return embedding(*inputs, **{"dropout_p": P, "seed": SEED, **options})


def definition(z):
    """The same in PyTorch; z is 1 / (1 - p) for the elements to keep, 0 for the others."""

    def function(tokens, weight, *, position_weight, position=None, dtype=None):
        if position is None:
            position = torch.arange(tokens.shape[-1], device=tokens.device)
        y = weight[tokens] + position_weight[position]
        return (y * z.to(y.dtype).view_as(y)).to(dtype or weight.dtype)

    return function


@pytest.mark.plain
@pytest.mark.parametrize("is_dispatched", [False, True])
def test_gradients_match_finite_differences(is_dispatched, monkeypatch):
    """Test the operator, and the PyTorch functions that replace it on a CPU."""
    monkeypatch.setattr(MODULE._fwd, "_composite_if", lambda *_: not is_dispatched)
    tokens, weight, table, _ = tensors(2, 3, 4, 5, torch.float64, "cpu")
    position = torch.tensor([[0, 1, 2], [0, 0, 1]])
    for options in ({}, {"position": position}):
        assert torch.autograd.gradcheck(
            lambda w, p, options=options: drop(tokens, w, position_weight=p, **options),
            (weight.requires_grad_(), table.requires_grad_()),
        )


@pytest.mark.parametrize(
    ("dtype", "y_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize(("B", "T", "V", "D"), [(1, 1, 1, 1), (3, 43, 11, 33), (2, 5, 9, 257)])
@pytest.mark.parametrize("has_position", [False, True])
def test_forward_and_backward_use_the_mask_of_the_seed(
    has_position, B, T, V, D, dtype, y_dtype, device
):
    tokens, weight, table, dy = tensors(B, T, V, D, dtype, device)
    dropout = Dropout(dropout_p=P, seed=torch.tensor(SEED, device=device))
    z = kept_elements(B * T, D, dropout).double() / (1 - P)
    options = {"position": tokens % (T + 2)} if has_position else {}
    dy = dy.to(y_dtype)
    got = run(drop, tokens, weight, table, dy, dtype=y_dtype, **options)
    exact = [value.double() for value in (weight, table, dy)]
    truth = run(definition(z), tokens, *exact, dtype=torch.float64, **options)
    baseline = run(definition(z), tokens, weight, table, dy, dtype=y_dtype, **options)
    # As in test_embedding.py: the terms of a sum may cancel.
    indices = (tokens, *options.values())
    longest = max(int(torch.bincount(index.flatten()).max()) for index in indices) + B
    scale = longest**0.5 * dy.abs().max().item() / (1 - P)
    for name, *values in zip(NAMES, got, truth, baseline, strict=True):
        terms = 0.0 if name == "y" else scale
        assert_accurate(name, *values, length=longest, scale=terms, terms=torch.float32)
    assert torch.equal(got[0].view_as(z)[z == 0], torch.zeros_like(z[z == 0], dtype=y_dtype))


def test_compiled_code_and_reruns_are_bitwise_equal_for_a_shared_weight(device, monkeypatch):
    """Compiled once for all seeds, with the gradient of a head added in place."""
    monkeypatch.setattr(MODULE._fwd, "_composite_if", lambda *_: False)
    torch._dynamo.reset()
    tokens, weight, table, dy = tensors(2, 20, 13, 8, torch.float32, device)

    def function(tokens, weight, *, seed, position_weight):
        y, head = drop(
            tokens, weight, position_weight=position_weight, seed=seed, return_weight=True
        )
        return y @ head.T @ head

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for number in (1, 2):
        seed = torch.tensor(number, device=device)
        with torch.compiler.set_stance("default" if number == 1 else "fail_on_recompile"):
            got = run(compiled, tokens, weight, table, dy, seed=seed)
        expected = run(function, tokens, weight, table, dy, seed=seed)
        assert_equal(got, expected)
        assert_equal(run(function, tokens, weight, table, dy, seed=seed), expected)


def test_only_the_seed_is_kept_for_the_backward(device, monkeypatch):
    monkeypatch.setattr(MODULE._fwd, "_composite_if", lambda *_: False)
    tokens, weight, table, _ = tensors(2, 20, 13, 8, torch.float32, device)
    weight.requires_grad_()
    without = saved_shapes(embedding, tokens, weight, position_weight=table)
    assert saved_shapes(drop, tokens, weight, position_weight=table) == sorted([*without, ()])


def test_zero_probability_matches_no_dropout(device):
    inputs = tensors(2, 20, 13, 8, torch.bfloat16, device)
    assert_equal(run(drop, *inputs, dropout_p=0.0), run(embedding, *inputs))


@pytest.mark.plain
def test_bad_options_raise():
    tokens, weight, *_ = tensors(2, 3, 4, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"^embedding: dropout_p must be in \[0, 1\), got 1.0"):
        embedding(tokens, weight, dropout_p=1.0)
    with pytest.raises(ValueError, match=r"^embedding: seed must be .*, got torch.float32 \(\)"):
        embedding(tokens, weight, dropout_p=0.5, seed=torch.tensor(1.0))
