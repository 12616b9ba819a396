import math

import pytest
import torch
import torch.nn.functional as F

from tritium.model import GPT, GPTConfig
from tritium.train.evaluate import evaluate

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
