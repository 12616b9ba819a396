import math

import pytest
import torch

from tests.train.data.tokenizers.test_continuation import Spaced
from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.data.tokenizers.tokenizer import from_spec
from tritium.train.eval.choice import encode_examples, measure_choices
from tritium.train.eval.choice_formats import Example

pytestmark = pytest.mark.plain
BYTES = from_spec("bytes", list)


@pytest.fixture
def model() -> GPT:
    """Each token is equally likely: the log-likelihood of n bytes is -n log(257)."""
    config = GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=257, context_tokens=16)
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def measure(model: GPT, task: str, *examples: Example) -> dict[str, float]:
    encoded = encode_examples(examples, BYTES, 16)
    return measure_choices(model, task, examples, encoded, batch_size=3)


def test_accuracies_of_a_model_for_which_all_bytes_are_equally_likely(model):
    choices = (" abc", " a", " abcdef")
    found = [measure(model, "plain", Example("context", choices, label)) for label in range(3)]
    # The sum prefers the shortest choice. Per character the space weighs least in the longest.
    assert [each["accuracy_sum"] for each in found] == [0, 1, 0]
    assert [each["accuracy_per_character"] for each in found] == [0, 0, 1]


def test_last_word_perplexity_of_a_model_for_which_all_bytes_are_equally_likely(model):
    examples = [Example("one", (" ab",), 0), Example("one two", (" abcd",), 0)]
    found = measure(model, "lambada", *examples)
    assert found["last_word_perplexity"] == pytest.approx(math.pow(257, 4), rel=1e-4)
    assert found["last_word_accuracy"] == 0


def test_choices_are_encoded_as_they_follow_the_context():
    spaced = Spaced("bytes", "bytes", BYTES.pieces)
    ((context, choices),) = encode_examples([Example("one", (" two", " six"), 0)], spaced, 16)
    joined = [spaced.encode("one" + choice).tolist() for choice in (" two", " six")]
    assert [context + choice for choice in choices] == [[256, *tokens] for tokens in joined]


def test_the_space_of_a_context_is_encoded_with_each_choice():
    ((context, choices),) = encode_examples([Example("one", (" a", "b"), 0, " ")], BYTES, 16)
    assert (context, choices) == (list(b"one"), [list(b"  a"), list(b" b")])


def test_a_choice_longer_than_the_context_raises():
    with pytest.raises(InputError, match=r"choice: expected 1 to 16 tokens.*got 17 in example 1"):
        encode_examples([Example("a", ("b", "c" * 17), 0)], BYTES, 16)


def test_an_empty_choice_raises():
    with pytest.raises(InputError, match=r"choice: expected 1 to 16 tokens.*got 0 in example 2"):
        encode_examples([Example("a", ("b", "c"), 0), Example("a", ("b", ""), 0)], BYTES, 16)


def test_the_progress_of_a_task_counts_each_choice(model):
    examples = [Example("one", (" a", " b"), 0), Example("two", (" c", " d", " e"), 1)]
    done = []
    encoded = encode_examples(examples, BYTES, 16)
    measure_choices(model, "plain", examples, encoded, batch_size=2, report=done.append)
    assert sum(done) == 5
