"""The loss of DPO, compared with its formula on logits."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.model.models import LLAMA, SMALL, random_model
from tritium.model.preference import as_preference_model, dpo_loss

pytestmark = pytest.mark.plain

TOKENS = (torch.arange(80) * 7 % SMALL.vocab_size).view(4, 20)
TARGETS = TOKENS.roll(-1, 1).clone()
TARGETS[:, :5] = -100
TARGETS[0, 12:] = TARGETS[3, 17:] = -100
TARGETS[1, 6:] = -100  # an answer of one token
REFERENCE = torch.tensor([1.5, -3.0])


def logps_of(model, *, is_mean=False) -> torch.Tensor:
    """Return log p of the answers from the logits."""
    logps = F.log_softmax(model(TOKENS), dim=-1)
    kept = TARGETS != -100
    each = logps.gather(2, TARGETS.clamp(min=0)[..., None])[..., 0] * kept
    return each.sum(1) / kept.sum(1) if is_mean else each.sum(1)


@pytest.mark.parametrize("config", [SMALL, replace(LLAMA, tied_head=False)], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.5, "label_smoothing": 0.2}, {"length_normalize": True}],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_formula(config, options):
    plain = random_model(config).double()
    model = as_preference_model(random_model(config), **options).double()
    assert not [name for name, each in model.named_parameters() if each.is_meta]
    loss = model(TOKENS, TARGETS, reference=REFERENCE)
    loss.backward()

    chosen, rejected = logps_of(plain, is_mean=options.get("length_normalize")).chunk(2)
    margin = options.get("beta", 0.1) * (chosen - rejected - REFERENCE)
    s = options.get("label_smoothing", 0.0)
    expected = -(1 - s) * margin.sigmoid().log() - s * (-margin).sigmoid().log()
    expected.mean().backward()
    # linear_cross_entropy returns float32 losses.
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-5, atol=1e-6)
    found = model(TOKENS, TARGETS, reference=REFERENCE, reduction="none")
    torch.testing.assert_close(found.double(), margin, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_is_log_2_before_the_first_step():
    model = as_preference_model(random_model().eval())
    chosen, rejected = model.answer_logps(TOKENS, TARGETS).detach().chunk(2)
    loss = model(TOKENS, TARGETS, reference=chosen - rejected)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert dpo_loss(torch.zeros(1), 0.3).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_compute_dtype_are_those_of_the_gpt(training):
    plain = random_model().train(training)
    plain.compute_dtype = torch.bfloat16
    model = as_preference_model(plain)
    assert model.training == model.h[0].training == training
    assert model.compute_dtype == torch.bfloat16


def test_without_a_reference_it_is_a_gpt():
    plain = random_model().eval()
    model = as_preference_model(plain)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert torch.equal(model(TOKENS, TARGETS), plain(TOKENS, TARGETS))


def test_padding_after_an_answer_changes_nothing():
    model = as_preference_model(random_model()).eval()
    padded = F.pad(TOKENS, (0, 4)), F.pad(TARGETS, (0, 4), value=-100)
    margins = [
        model(*pair, reference=REFERENCE, reduction="none") for pair in ((TOKENS, TARGETS), padded)
    ]
    torch.testing.assert_close(*margins, rtol=0, atol=1e-5)
