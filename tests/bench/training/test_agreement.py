from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tritium.bench.training.agreement import check_agreement
from tritium.bench.training.baseline import Baseline
from tritium.bench.training.implementations import make_implementations
from tritium.bench.training.training import random_batch
from tritium.errors import InputError
from tritium.train.config import TrainConfig

pytestmark = pytest.mark.plain

CONFIG = TrainConfig.from_options(n_layer=1, n_head=2, d_model=16, context_tokens=16, batch_size=2)
SHAPE = CONFIG.gpt(vocab_size=300)


def agreement(config=CONFIG, attentions=()):
    """Compare the last model before the baseline with it."""
    models = make_implementations(config, SHAPE, torch.device("cpu"), [False], attentions)
    found = check_agreement(config, models[-2], models[-1], random_batch(config, SHAPE, 0))
    for model in models:
        assert all(parameter.grad is None for parameter in model.model.parameters())
    return found


def change_logits(monkeypatch, change):
    """Make the baseline compute another function."""
    forward = Baseline.forward

    def changed(self, tokens, targets=None, token_order=None):
        logits = change(forward(self, tokens))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    monkeypatch.setattr(Baseline, "forward", changed)


@pytest.mark.parametrize(
    "change", [lambda z: 1.01 * z, lambda z: z.roll(1, dims=1), lambda z: z * torch.nan]
)
def test_other_logits_raise(monkeypatch, change):
    change_logits(monkeypatch, change)
    expected = (
        r"the (loss|gradient) of tritium on the first batch to differ from the baseline's "
        r"by rounding, up to .*, got"
    )
    with pytest.raises(InputError, match=expected):
        agreement()


def test_equal_losses_with_other_gradients_raise(monkeypatch):
    change_logits(monkeypatch, lambda z: z.detach() + 0.5 * (z - z.detach()))
    with pytest.raises(InputError, match="the gradient of tritium on the first batch"):
        agreement()


def test_a_missing_causal_mask_exceeds_the_bound_of_bfloat16(monkeypatch):
    config = CONFIG.with_options(precision="bfloat16")
    assert agreement(config)["gradient_gap"] > 1e-4, "bfloat16 had no effect"

    # Only in the baseline's module: on a CPU tritium's attention is PyTorch's function too.
    def unmasked(q, k, v, **_):
        return F.scaled_dot_product_attention(q, k, v)

    changed = SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": unmasked})
    monkeypatch.setattr("tritium.bench.training.baseline.F", changed)
    with pytest.raises(InputError, match="gradient"):
        agreement(config)
