"""Perplexity of a text: windows with a stride, and four ways to say how likely the text is.

    loss               nats per token: sum_i(weight_i * mean_i) / sum_i(weight_i) over windows
    perplexity         exp(loss): per token, so it depends on the tokenizer
    word_perplexity    exp(loss * tokens / words)
    bits_per_byte      loss * tokens / bytes / ln 2

`tokens`, `bytes` and `words` are sizes of the text, so the last two compare models with different
tokenizers. No value depends on the batch size, except by rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from ...model import GPT
from ..data.shards import TokenStream
from ..evaluate import exp_or_inf
from .scoring import target_losses
from .texts import Text
from .windows import COUNTINGS, Window, check_sizes

Place = tuple[TokenStream, Window]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The loss of a text. The top of this file has the definitions."""

    loss: float
    targets: int
    """Number of predictions whose losses are in `loss`."""
    word_perplexity: float | None
    """None: the number of words is not known."""
    bits_per_byte: float | None
    """None: the number of bytes is not known."""

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity."""
        return exp_or_inf(self.loss)


def measure(
    model: GPT,
    text: Text,
    *,
    context: int,
    stride: int,
    counting: str = "exact",
    batch_size: int,
    max_targets: int | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """Compute the perplexity of a text.

    Args:
        model: in evaluation mode.
        text: one window of tokens or more.
        context: tokens per window.
        stride: tokens between the beginnings of windows.
        counting: a row of COUNTINGS.
        batch_size: windows per forward.
        max_targets: evaluate only windows with about so many targets, spread evenly over the text.
            None: all windows.
        report: called with the number of targets that are done since the last call.
    Raises: InputError for sizes out of range, or a text that is shorter than one window.
    """
    check_sizes(context, stride, model.config.context_tokens)
    places = _places(text, context, stride, counting)
    if max_targets is not None:
        places = _spread(places, max_targets)
    total = 0.0
    weight = 0
    targets = 0
    for batch in _batches(places, batch_size):
        rows = []
        for stream, window in batch:
            tokens = stream.read(window.begin, window.end + 1).astype(np.int64)
            rows.append((tokens[:-1], tokens[1 + window.first - window.begin :]))
        for (_, window), losses in zip(batch, target_losses(model, rows), strict=True):
            total += losses.mean().item() * window.weight
            weight += window.weight
        done = sum(window.num_targets for _, window in batch)
        targets += done
        report(done)
    return _perplexity(text, total / weight, targets)


def check_length(text: Text, context: int) -> None:
    """Raise InputError if a text is shorter than one window."""
    if text.tokens == 0:
        raise InputError(f"{text.path}: expected text, got an empty file")
    if text.tokens < context:
        raise InputError(
            f"{text.path}: expected at least {context} tokens, one window, got {text.tokens}; "
            "give a longer text, or evaluate with a smaller `context_tokens`"
        )


def num_targets(text: Text, context: int, stride: int, counting: str = "exact") -> int:
    """Return the number of predictions that `measure` makes of the complete text."""
    return sum(window.num_targets for _, window in _places(text, context, stride, counting))


def _places(text: Text, context: int, stride: int, counting: str) -> list[Place]:
    """Return the windows over all sequences of a text."""
    check_length(text, context)
    windows = COUNTINGS[counting]
    return [
        (stream, window)
        for stream in text.sequences
        for window in windows(len(stream), context, stride)
    ]


def _spread(places: list[Place], max_targets: int) -> list[Place]:
    """Return some windows, evenly spread, and at least one."""
    all_targets = sum(window.num_targets for _, window in places)
    count = max(1, min(len(places), len(places) * max_targets // all_targets))
    return [places[i * len(places) // count] for i in range(count)]


def _batches(places: Sequence[Place], batch_size: int) -> Iterator[Sequence[Place]]:
    for start in range(0, len(places), batch_size):
        yield places[start : start + batch_size]


def _perplexity(text: Text, loss: float, targets: int) -> Perplexity:
    nats = loss * text.tokens
    return Perplexity(
        loss=loss,
        targets=targets,
        word_perplexity=exp_or_inf(nats / text.words) if text.words else None,
        bits_per_byte=nats / text.bytes / math.log(2) if text.bytes else None,
    )
