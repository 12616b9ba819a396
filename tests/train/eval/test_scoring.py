import pytest
import torch

from tritium.model import GPT, GPTConfig
from tritium.train.eval.scoring import score, target_losses

pytestmark = pytest.mark.plain
V = 40


@pytest.fixture(params=["learned", "rotary"])
def model(request) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=2, n_head=2, d_model=32, vocab_size=V, context_tokens=12, position=request.param
    )
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def brute_force(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood and is_greedy from the logits of one sequence, the newest tokens of it."""
    tokens = (context + continuation)[-13:]
    logits = model(torch.tensor([tokens[:-1]]))[0, -len(continuation) :].double()
    found = logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None])
    return found.sum().item(), logits.argmax(-1).tolist() == continuation


def test_scores_equal_brute_force_whether_contexts_are_shared_or_not(model):
    torch.manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(V, (count,)).tolist()

    pairs = [(tokens(n), tokens(m)) for n, m in ((3, 2), (1, 1), (9, 4), (30, 3), (2, 12))]
    for shared in (tokens(1), tokens(6), tokens(8), tokens(25)):
        pairs += [(shared, tokens(n)) for n in (1, 4, 2, 5)]
    # Continuations that the model finds most likely.
    for context in ([5], [7, 3]):
        first = model(torch.tensor([context]))[0, -1].argmax().item()
        pairs += [(context, [first]), (context, [(first + 1) % V])]
    expected = [brute_force(model, *pair) for pair in pairs]
    for batch_size in (1, 3, 50):
        done = []
        found = score(model, pairs, batch_size=batch_size, report=done.append)
        assert [each.log_likelihood for each in found] == pytest.approx(
            [each for each, _ in expected], abs=1e-5
        )
        assert [each.is_greedy for each in found] == [each for _, each in expected]
        assert [each.num_tokens for each in found] == [len(each) for _, each in pairs]
        assert sum(done) == len(pairs)
    assert [each.is_greedy for each in found[-4:]] == [True, False, True, False]


def test_a_shared_context_is_computed_once(model, monkeypatch):
    lengths = []
    hidden = GPT.hidden

    def counting(self, tokens, **options):
        lengths.append(tuple(tokens.shape))
        return hidden(self, tokens, **options)

    monkeypatch.setattr(GPT, "hidden", counting)
    score(model, [([1, 2, 3, 4, 5, 6], [n, n]) for n in range(4)], batch_size=4)
    assert lengths == [(1, 5), (4, 2)]


def test_losses_are_those_of_the_last_inputs(model):
    rows = [([1, 2, 3], [4, 5]), ([6], [7])]
    found = target_losses(model, rows)
    assert [len(each) for each in found] == [2, 1]
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))[0].log_softmax(-1)
    expected = [-logits[1, 4].item(), -logits[2, 5].item()]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)
