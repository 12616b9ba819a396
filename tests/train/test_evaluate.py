import math

import pytest
import torch
import torch.nn.functional as F

from tritium.model import GPT, GPTConfig
from tritium.train.evaluate import batch_loss, evaluate

pytestmark = pytest.mark.plain


def test_every_target_counts_once():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=30, context_tokens=8))
    batches = []
    for rows in (4, 1):
        tokens, targets = torch.randint(30, (2, rows, 8))
        targets[0, 3:] = -100
        batches.append((tokens, targets))
    result = evaluate(model, batches, bytes_per_token=2.5)
    logits = torch.cat([model(tokens).flatten(0, 1) for tokens, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    expected = F.cross_entropy(logits, targets).item()
    assert result.tokens == int((targets != -100).sum())
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 2.5, rel=1e-5)


def test_with_a_separator_documents_are_scored_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=30, context_tokens=8))
    tokens, targets = torch.randint(29, (2, 2, 8))
    tokens[0, 3] = tokens[1, 6] = 29
    documents = [slice(0, 3), slice(3, 8), slice(8, 14), slice(14, 16)]
    flat, flat_targets = tokens.flatten(), targets.flatten()
    logits = torch.cat([model(flat[None, span])[0] for span in documents])
    expected = F.cross_entropy(logits, flat_targets).item()
    assert batch_loss(model, tokens, targets, 29).item() == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, [(tokens, targets)], bytes_per_token=1, separator=29).loss == pytest.approx(expected, rel=1e-5)
    assert batch_loss(model, tokens, targets, None).item() != pytest.approx(expected, rel=1e-3)
