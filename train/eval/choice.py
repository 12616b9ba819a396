"""Score the choices of examples: which of several texts follows a context best."""

from collections.abc import Callable, Sequence

from ...errors import InputError
from ...model import GPT
from ..data.tokenizers.continuation import encode_continuation
from ..data.tokenizers.tokenizer import Tokenizer
from .choice_formats import FORMATS, METRICS, Example
from .scoring import score

Encoded = list[tuple[list[int], list[list[int]]]]
"""The tokens of the context and of each choice, per example."""


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, context_tokens: int
) -> Encoded:
    """Convert examples to tokens.

    Raises: InputError if a choice has no token, or more than `context_tokens`.
    """
    encoded = []
    for number, example in enumerate(examples, 1):
        context = tokenizer.encode(example.context).tolist()
        choices = [
            encode_continuation(tokenizer, example.context, example.space + choice, context)
            for choice in example.choices
        ]
        for tokens in choices:
            if not 1 <= len(tokens) <= context_tokens:
                raise InputError(
                    f"choice: expected 1 to {context_tokens} tokens, the context of the model, got "
                    f"{len(tokens)} in example {number}"
                )
        encoded.append(([*tokenizer.start_tokens, *context], choices))
    return encoded


def measure_choices(
    model: GPT,
    task: str,
    examples: Sequence[Example],
    encoded: Encoded,
    *,
    batch_size: int,
    report: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Return the metrics of a format.

    Args:
        model: in evaluation mode.
        task: its name, a row of FORMATS.
        examples, encoded: from `read_examples` and `encode_examples`.
        batch_size: sequences per forward.
        report: called with the number of choices that are done since the last call.
    """
    pairs = [(context, choice) for context, choices in encoded for choice in choices]
    found = iter(score(model, pairs, batch_size=batch_size, report=report))
    scores = [[next(found) for _ in choices] for _, choices in encoded]
    return {name: METRICS[name](examples, scores) for name in FORMATS[task].metrics}
