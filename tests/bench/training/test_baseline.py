from dataclasses import replace

import pytest
import torch

from tritium.bench.training.baseline import Baseline
from tritium.model import GPT, GPTConfig

pytestmark = pytest.mark.plain

SMALL = GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=90, context_tokens=24)
LLAMA = replace(SMALL, position="rotary", norm="rms", mlp="swiglu", bias=False)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, n_kv_head=2),
        replace(SMALL, n_kv_head=1),
        replace(SMALL, bias=False),
        replace(SMALL, norm="rms"),
        replace(SMALL, mlp="gelu_exact"),
        replace(SMALL, mlp="relu2"),
        LLAMA,
    ],
    ids=str,
)
def test_baseline_computes_the_same_function_as_gpt_in_float64(config):
    torch.manual_seed(0)
    ours, baseline = GPT(config).double(), Baseline(config).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0.0, 0.2)  # initial biases of 0 would hide a missing one
    baseline.load_state_dict(ours.state_dict())
    tokens, targets = torch.randint(90, (2, 3, 20))
    targets[0, :5] = -100

    torch.testing.assert_close(baseline(tokens), ours(tokens), rtol=1e-9, atol=1e-9)
    losses = baseline(tokens, targets), ours(tokens, targets)
    # The loss of linear_cross_entropy is rounded to float32.
    rtol = 2 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(losses[0].float(), losses[1].float(), rtol=rtol, atol=0)
    for loss in losses:
        loss.backward()
    expected = dict(baseline.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            expected[name].grad, parameter.grad, rtol=1e-8, atol=1e-10, msg=name
        )


def test_baseline_compiles_as_one_graph():
    torch.manual_seed(0)
    baseline = Baseline(SMALL)
    tokens = torch.randint(90, (2, 12))
    compiled = torch.compile(baseline, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, tokens), baseline(tokens, tokens))
