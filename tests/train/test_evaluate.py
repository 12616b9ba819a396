import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tritium.kernels.embedding import order_of
from tritium.model import GPT, GPTConfig
from tritium.train.data.loader import Batch, token_orders
from tritium.train.evaluate import Evaluation, batch_loss, evaluate

pytestmark = pytest.mark.plain


def test_the_loss_is_the_mean_over_all_targets():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=30, context_tokens=8))
    batches = []
    for rows in (4, 1):
        batches.append(Batch(torch.randint(30, (rows, 9)), np.array([3, *[8] * (rows - 1)])))
    without_targets = Batch(batches[1].windows, np.array([0]))
    assert evaluate(model, [], bytes_per_token=2.5) is None
    result = evaluate(model, [*batches, without_targets], bytes_per_token=2.5)
    pairs = [batch.on("cpu") for batch in batches]
    logits = torch.cat([model(tokens).flatten(0, 1) for tokens, _ in pairs])
    targets = torch.cat([targets.flatten() for _, targets in pairs])
    expected = F.cross_entropy(logits, targets).item()
    assert result.tokens == int((targets != -100).sum())
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 2.5, rel=1e-5)


def test_an_evaluation_has_the_measures_of_its_task():
    text = Evaluation(loss=2.0, bits_per_byte=1.0, tokens=9)
    assert text.values() == {
        "val_loss": 2.0,
        "val_perplexity": math.exp(2),
        "val_bits_per_byte": 1.0,
    }
    assert text.describe() == "validation loss 2.0000, perplexity 7.39, 1.000 bits per byte"
    pairs = Evaluation(loss=0.5, tokens=9, unit="pair", more={"accuracy": 0.75})
    assert pairs.values() == {"val_loss": 0.5, "val_accuracy": 0.75}
    assert pairs.describe() == "validation loss 0.5000, accuracy 0.7500"
    for loss in (709.9, 1e4):  # math.exp raises
        assert Evaluation(loss=loss, tokens=1).perplexity == math.inf


def test_with_a_separator_documents_do_not_attend_to_each_other():
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=30, context_tokens=8))
    batch = Batch(torch.randint(29, (2, 9)), np.array([8, 8]))
    batch.windows[0, 3] = batch.windows[1, 6] = 29
    tokens, targets = batch.on("cpu")
    documents = [slice(0, 3), slice(3, 8), slice(8, 14), slice(14, 16)]
    flat, flat_targets = tokens.flatten(), targets.flatten()
    logits = torch.cat([model(flat[None, span])[0] for span in documents])
    expected = F.cross_entropy(logits, flat_targets).item()
    apart = replace(batch, separator=29)
    assert batch_loss(model, apart).item() == pytest.approx(expected, rel=1e-5)
    found = evaluate(model, [apart], bytes_per_token=1).loss
    assert found == pytest.approx(expected, rel=1e-5)
    assert batch_loss(model, batch).item() != pytest.approx(expected, rel=1e-3)


def test_loss_passes_the_order_of_a_sorted_batch():
    seen = []

    class Model(GPT):
        def forward(self, *tokens, **options):
            seen.append(options)
            return super().forward(*tokens, **options)

    model = Model(GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=30, context_tokens=8))
    windows = torch.randint(30, (4, 9))
    plain = Batch(windows, np.full(4, 8))
    ordered = Batch(windows, np.full(4, 8), token_orders(windows, 2), 2)
    for separator in (None, 7):
        batches = [replace(batch, separator=separator)[:2] for batch in (plain, ordered)]
        losses = [batch_loss(model, batch) for batch in batches]
        assert torch.equal(*losses)
        without, given = seen[-2:]
        assert "token_order" not in without
        assert torch.equal(given["token_order"].long(), order_of(windows[:2, :-1]))
