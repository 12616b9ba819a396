"""Small models that several test files use."""

from dataclasses import replace

import torch

from tritium.model import GPT, GPTConfig

SMALL = GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=90, context_tokens=24)
LLAMA = replace(SMALL, position="rotary", norm="rms", mlp="swiglu", bias=False)


def random_model(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """Return a model with random gains and biases too.

    With the initial biases of zero, a test would not notice a bias that is never added.
    """
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model
