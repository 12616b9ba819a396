"""Runs with any valid options: resumes are bitwise, and execution changes rounding only.

`pytest -m slow tests/train/test_any_run.py` tries more examples.
"""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tritium
from tritium.model import GPT, GPTConfig
from tritium.model.choices import MLPS, NORMS, POSITIONS, RECOMPUTATIONS
from tritium.train import api
from tritium.train.choices import OPTIMIZERS
from tritium.train.schedule import SCHEDULES

pytestmark = pytest.mark.plain

EXAMPLES = [2, pytest.param(60, marks=pytest.mark.slow)]
STEPS = 4


def choice(values) -> st.SearchStrategy:
    return st.sampled_from(list(values))


@st.composite
def shapes(draw) -> dict:
    """Options of a small model."""
    n_head, head_size = draw(choice([1, 2, 4, 6])), draw(choice([4, 6, 8, 16]))
    divisors = [count for count in (1, 2, 3, 6) if n_head % count == 0]
    others = {
        "n_layer": choice([1, 2]),
        "n_kv_head": choice([None, *divisors]),
        "context_tokens": choice([16, 33, 50]),
        "position": choice(POSITIONS),
        "norm": choice(NORMS),
        "mlp": choice(MLPS),
        "d_hidden": choice([None, 24]),
        "bias": st.booleans(),
        "qkv_bias": choice([None, True, False]),
        "tied_head": st.booleans(),
        "qk_norm": st.booleans(),
        "window": choice([None, 1, 7, 20]),
        "softcap": choice([0.0, 5.0]),
        "head_softcap": choice([0.0, 10.0]),
    }
    return {"n_head": n_head, "d_model": n_head * head_size} | draw(st.fixed_dictionaries(others))


def runs(*, has_dropout: bool) -> st.SearchStrategy:
    """Options of a run of STEPS steps."""
    dropout = choice([0.0, 0.2]) if has_dropout else st.just(0.0)
    others = {
        "tokenizer": choice(["bytes", "chars", "bpe:300"]),
        "batch_size": choice([2, 6]),
        "optimizer": choice(OPTIMIZERS),
        "schedule": choice(SCHEDULES),
        "grad_clip": choice([0.0, 1.0]),
        "document_mask": st.booleans(),
        "background_checkpoints": st.booleans(),
        "dropout": dropout,
        "embedding_dropout": dropout,
        "attention_dropout": dropout,
    }
    return st.builds(lambda shape, run: shape | run, shapes(), st.fixed_dictionaries(others))


def check(strategy: st.SearchStrategy, examples: int, test) -> None:
    """Run `test` with values of the strategy: the same ones in each process."""
    quiet = {"database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, deadline=None, derandomize=True, **quiet)(
        given(strategy)(test)
    )()


@pytest.fixture
def train(corpus, tmp_path):
    """Train in a new folder of this name: train("a", options) -> the run."""

    def call(name: str, options: dict) -> tritium.Run:
        out = tmp_path / name
        shutil.rmtree(out, ignore_errors=True)
        fixed = {"data": corpus, "steps": STEPS, "warmup_steps": 1, "lr": 1e-2, "device": "cpu"}
        files = {"eval_tokens": 64, "sample_tokens": 3, "checkpoint_interval": 2}
        return api.train("laptop", **fixed, **files, **options, out=out)

    return call


def losses(run: tritium.Run) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_resumed_run_ends_bitwise_like_an_unbroken_one(examples, train):
    def test(options: dict) -> None:
        run = train("unbroken", options)
        broken = run.folder.with_name("broken")
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(run.folder, broken)
        shutil.rmtree(broken / "checkpoints" / f"step-{STEPS}")
        resumed = tritium.load(broken).resume()
        assert losses(resumed) == losses(run)
        assert resumed.evaluation.loss == run.evaluation.loss
        for name, value in run.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), name

    check(runs(has_dropout=True), examples, test)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_execution_of_any_run_changes_rounding_only(examples, train):
    def test(options: dict) -> None:
        expected = losses(train("run", options))
        others = [{"micro_batch_size": 1}]
        for name, row in RECOMPUTATIONS.items():
            if options["mlp"] in row.mlps:
                others.append({"recompute": name})
        if not options["softcap"]:
            others.append({"attention": "sdpa"})
        for other in others:
            # Later steps differ more: updates of Muon and AdamW do not depend on the size of a
            # gradient, so that rounding of a small one counts.
            found = losses(train("other", options | other))
            assert found[:2] == pytest.approx(expected[:2], rel=2e-5), other

    check(runs(has_dropout=False), examples, test)


@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_any_model_generates_with_a_cache_what_it_generates_without(examples):
    def test(shape: dict, seed: int) -> None:
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size=30, **shape)).double().eval()
        for parameter in model.parameters():  # new weights are so small that tokens repeat
            parameter.data.normal_(0, 0.3)
        tokens = torch.randint(30, (2, 5))
        found = model.generate(tokens, 9, temperature=0)
        with torch.no_grad():
            for _ in range(9):
                tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
        assert found.tolist() == tokens.tolist()

    strategy = st.tuples(shapes(), st.integers(0, 1000))
    check(strategy, examples, lambda drawn: test(*drawn))
