"""Each option of GPTConfig, compared with the same model in plain PyTorch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.model import plain
from tests.model.models import LLAMA, SMALL, random_model
from tritium.model import GPT, GPTConfig

OPTIONS = {
    "gpt2": SMALL,
    "llama": LLAMA,
    "sinusoidal": replace(SMALL, position="sinusoidal"),
    "gelu_exact": replace(SMALL, mlp="gelu_exact"),
    "relu2": replace(SMALL, mlp="relu2"),
    "untied": replace(SMALL, tied_head=False),
    "head_softcap": replace(SMALL, head_softcap=2.0),
    "untied_head_softcap": replace(LLAMA, tied_head=False, head_softcap=2.0),
    "qkv_bias": replace(LLAMA, qkv_bias=True, n_kv_head=2),
    "no_qkv_bias": replace(SMALL, qkv_bias=False),
    "window": replace(SMALL, window=5),
    "softcap": replace(SMALL, softcap=1.5),
    "window_softcap_grouped": replace(LLAMA, window=7, softcap=1.5, n_kv_head=1),
    "qk_norm": replace(SMALL, qk_norm=True, norm_eps=1e-3),
    "qk_norm_rotary_grouped": replace(LLAMA, qk_norm=True, n_kv_head=2, norm_eps=1e-3),
}
CASES = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return dict(zip(names, gradients, strict=True)) | {"loss": loss.detach()}


@pytest.mark.plain
@CASES
def test_logits_loss_and_gradients_match_plain_pytorch(config):
    model = random_model(config).double()
    tokens, targets = random_tokens(2, 2, 20)
    logits = plain.logits(model, tokens)
    torch.testing.assert_close(model(tokens), logits, rtol=1e-9, atol=1e-9)

    found = loss_and_gradients(model, model(tokens, targets))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for name, expected in loss_and_gradients(model, loss).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.plain
@CASES
def test_cached_generation_gives_the_tokens_of_full_forwards(config):
    model = random_model(config)
    prompt = random_tokens(2, 4)
    expected = prompt
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, 12, temperature=0), expected)


@pytest.fixture
def fresh_compiler():
    """Forget compiled graphs, so that no test compiles for sizes that vary."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            replace(SMALL, tied_head=False, window=5, softcap=1.5, head_softcap=2.0),
            marks=pytest.mark.slow,
        ),
        replace(LLAMA, qk_norm=True, window=5, qkv_bias=True),
    ],
    ids=["gpt2", "llama"],
)
def test_options_compile_as_one_graph(config):
    model = random_model(config)
    tokens = random_tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))


@pytest.mark.plain
def test_window_of_the_context_matches_no_window():
    model = random_model(SMALL)
    other = GPT(replace(SMALL, window=SMALL.context_tokens))
    other.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 24)
    torch.testing.assert_close(other(tokens), model(tokens))


@pytest.mark.plain
def test_untied_head_starts_with_its_own_random_weight():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=64, vocab_size=256, tied_head=False))
    assert abs(model.lm_head.weight.std().item() / 0.02 - 1) < 0.05
    assert not torch.equal(model.lm_head.weight, model.wte.weight)
