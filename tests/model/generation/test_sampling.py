import pytest
import torch

from tritium.model.generation import Sampling
from tritium.model.generation.sampling import choose, draw_numbers

pytestmark = pytest.mark.plain


def sampled(probabilities: list[float], count: int = 4000, **options) -> torch.Tensor:
    """How often each token is chosen in `count` draws."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    draws = draw_numbers([0], count)[:, 0]
    return choose(logits, draws, Sampling(**options)).bincount(minlength=len(probabilities))


def test_tokens_are_drawn_with_their_probabilities():
    expected = torch.tensor([0.5, 0.0, 0.125, 0.375])
    found = sampled(expected.tolist(), 100_000) / 100_000
    assert (found - expected).abs().max() < 0.006  # about four standard deviations
    assert found[1] == 0


def test_temperature_divides_the_logits():
    found = sampled([0.2, 0.8], 50_000, temperature=2.0) / 50_000
    assert abs(found[1] - 2 / 3) < 0.01  # sqrt(0.8 / 0.2) to 1


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 0.49}, {1}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.81}, {0, 1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"min_p": 0.25}, {0, 1, 3}),
        ({"min_p": 0.5}, {1, 3}),
        ({"top_k": 3, "min_p": 0.5}, {1, 3}),
        # Among three tokens the first has 0.53 of the probability.
        ({"top_k": 3, "top_p": 0.52}, {1}),
        ({"top_k": 3, "top_p": 0.54}, {1, 3}),
    ],
    ids=str,
)
def test_filters_keep_the_tokens_of_their_definition(options, kept):
    counts = sampled([0.15, 0.5, 0.05, 0.3], **options)
    assert set(counts.nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_filters_and_penalty_match_transformers(temperature):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, 60) * 3
    tokens = torch.randint(60, (4, 9))
    seen = torch.zeros(4, 60, dtype=torch.bool).scatter(1, tokens, True)
    options = {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.7}
    sampling = Sampling(temperature=temperature, **options)
    expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(tokens, logits)
    if temperature:
        expected = processors.TopKLogitsWarper(20)(tokens, expected)
        expected = processors.TopPLogitsWarper(0.8)(tokens, expected)
        expected = processors.MinPLogitsWarper(0.05)(tokens, expected)
    else:
        expected = expected.masked_fill(expected < expected.amax(-1, keepdim=True), -torch.inf)
    found = torch.stack(
        [choose(logits, numbers, sampling, seen) for numbers in draw_numbers([1, 2, 3, 4], 400)]
    )
    for row in range(4):
        assert set(found[:, row].tolist()) == set(expected[row].isfinite().nonzero()[:, 0].tolist())


def test_numbers_depend_on_the_seed_and_the_step_only():
    together = draw_numbers([7, 8, 2**63 + 5], 20)
    assert torch.equal(draw_numbers([8], 50)[:20, 0], together[:, 1])
    assert together.unique().numel() == 60
    assert 0 <= together.min() <= together.max() < 2**30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected 0 or more, got -1"),
        ({"temperature": -1.0}, "temperature: expected 0 or more and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more and finite, got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, r"min_p: expected in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected positive and finite, got 0.0"),
        ({"seed": -1}, "seed: expected from 0 to 2"),
        ({"stop_tokens": (-1,)}, "stop_tokens: expected ids of 0 or more"),
        ({"stop": ("a", "")}, "stop: expected texts that are not empty"),
    ],
)
def test_option_out_of_range_raises(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
