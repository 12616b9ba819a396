"""The baseline is the same function as the model it is measured beside, to rounding in float64."""

import pytest
import torch

from tritium.bench.training.baseline import Baseline
from tritium.model import GPT, GPTConfig

pytestmark = pytest.mark.plain

SMALL = GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=90, context_tokens=24)


LLAMA = SMALL.with_options(position="rotary", norm="rms", mlp="swiglu", bias=False)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL.with_options(n_kv_head=2),
        SMALL.with_options(n_kv_head=1),
        SMALL.with_options(bias=False),
        LLAMA,
    ],
    ids=str,
)
def test_logits_loss_and_gradients_are_ours(config):
    torch.manual_seed(0)
    ours, baseline = GPT(config).double(), Baseline(config).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0.0, 0.2)  # fresh ones would hide a bias that is never added
    baseline.load_state_dict(ours.state_dict())
    tokens, targets = torch.randint(90, (2, 3, 20))
    targets[0, :5] = -100

    torch.testing.assert_close(baseline(tokens), ours(tokens), rtol=1e-9, atol=1e-9)
    losses = baseline(tokens, targets), ours(tokens, targets)
    # Ours is rounded to float32.
    torch.testing.assert_close(
        losses[0].float(), losses[1].float(), rtol=2 * torch.finfo(torch.float32).eps, atol=0
    )
    for loss in losses:
        loss.backward()
    theirs = dict(baseline.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            theirs[name].grad, parameter.grad, rtol=1e-8, atol=1e-10, msg=name
        )


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    baseline = Baseline(SMALL)
    tokens = torch.randint(90, (2, 12))
    compiled = torch.compile(baseline, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, tokens), baseline(tokens, tokens))
