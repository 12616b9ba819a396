"""The jsonl formats of `tritium eval choice`: one row of FORMATS per format.

    hellaswag           {"ctx", "endings", "label"}: the published file, read as llm.c and
                        build-nanogpt read it: the context and " " + ending as they are
    hellaswag-lm-eval   the same file, read as lm-evaluation-harness reads it: the activity label in
                        front, and marks such as [title] removed
    lambada             {"text"}: the last word is to be predicted, as in lm-evaluation-harness
    plain               {"context", "choices", "label"}: each choice follows the context as it is,
                        so a choice begins with its space

lm-evaluation-harness moves spaces at the end of a context to the start of what follows, before it
encodes. So do hellaswag-lm-eval and lambada.

A row says which metrics are printed. All are the mean over the examples:

    accuracy_sum             the choice with the largest log-likelihood is right (lm-eval: acc)
    accuracy_per_token       log-likelihood / tokens (acc_norm of llm.c and build-nanogpt)
    accuracy_per_character   log-likelihood / characters, without the one space that separates the
                             choice from its context (acc_norm of lm-eval)
    last_word_accuracy       each token of the last word is the most likely one
    last_word_perplexity     exp(-mean log-likelihood of the last word)
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ..storage.records import shorten
from .jsonl import read_jsonl, text_of

if TYPE_CHECKING:
    from .scoring import Score


@dataclass(frozen=True)
class Example:
    """A context, texts that may follow it, and the index of the right one.

    Attributes:
        space: spaces that were at the end of the context. They are encoded with each choice.
    """

    context: str
    choices: tuple[str, ...]
    label: int
    space: str = ""


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        keys: that a record must have.
        read: returns the example of a record. Its second argument is the place, for errors.
        metrics: names in METRICS.
    """

    keys: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Example]
    metrics: tuple[str, ...]


# --- formats


def _hellaswag(record: dict[str, Any], place: str) -> Example:
    context = text_of(record, "ctx", place)
    endings = _choices(record, "endings", place)
    return Example(
        context, tuple(f" {ending}" for ending in endings), _label(record, len(endings), place)
    )


def _hellaswag_lm_eval(record: dict[str, Any], place: str) -> Example:
    first, label = (text_of(record, key, place) for key in ("ctx_a", "activity_label"))
    second = record.get("ctx_b")
    if not isinstance(second, str):
        raise InputError(f"{place}: ctx_b: expected text, got {shorten(second)}")
    endings = tuple(map(_without_marks, _choices(record, "endings", place)))
    context = _without_marks(f"{label}: {first} {second.capitalize()}")
    choices = tuple(f" {ending}" for ending in endings)
    return _move_space(Example(context, choices, _label(record, len(endings), place)))


def _move_space(example: Example) -> Example:
    """Move the spaces and line ends at the end of the context to `space`."""
    context = example.context.rstrip()
    return replace(example, context=context, space=example.context[len(context) :])


def _without_marks(text: str) -> str:
    """Remove what WikiHow's part of HellaSwag has in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _lambada(record: dict[str, Any], place: str) -> Example:
    context, space, word = text_of(record, "text", place).rpartition(" ")
    if not context.strip() or not word:
        raise InputError(
            f"{place}: text: expected two words or more, got {shorten(record['text'])}"
        )
    return _move_space(Example(context, (space + word,), 0))


def _plain(record: dict[str, Any], place: str) -> Example:
    choices = _choices(record, "choices", place)
    return Example(text_of(record, "context", place), choices, _label(record, len(choices), place))


def _choices(record: dict[str, Any], key: str, place: str) -> tuple[str, ...]:
    choices = record[key]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{place}: {key}: expected two texts or more, got {shorten(choices)}")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise InputError(
                f"{place}: {key}: expected text in choice {number}, got {shorten(choice)}"
            )
    return tuple(choices)


def _label(record: dict[str, Any], count: int, place: str) -> int:
    label = record["label"]
    if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label):
        label = int(label)  # Hugging Face's copy of HellaSwag
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < count:
        raise InputError(f"{place}: label: expected 0 to {count - 1}, got {shorten(label)}")
    return label


_ACCURACIES = ("accuracy_sum", "accuracy_per_token", "accuracy_per_character")
_HELLASWAG_KEYS = ("ctx", "endings", "label")
FORMATS = {
    "hellaswag": Format(_HELLASWAG_KEYS, _hellaswag, _ACCURACIES),
    "hellaswag-lm-eval": Format(
        (*_HELLASWAG_KEYS, "ctx_a", "ctx_b", "activity_label"), _hellaswag_lm_eval, _ACCURACIES
    ),
    "plain": Format(("context", "choices", "label"), _plain, _ACCURACIES),
    "lambada": Format(("text",), _lambada, ("last_word_accuracy", "last_word_perplexity")),
}


def read_examples(path: Path, name: str = "auto") -> tuple[str, list[Example]]:
    """Read a jsonl file.

    Args: name: a row of FORMATS. auto: the first row whose keys the first line has.
    Returns: the name of the row, and the examples.
    Raises: InputError, which names the file and the line, for a line that does not fit.
    """
    records = list(read_jsonl(path))
    if name == "auto":
        place, first = records[0]
        fitting = [row for row, each in FORMATS.items() if first.keys() >= set(each.keys)]
        if not fitting:
            keys = "; ".join(", ".join(row.keys) for row in FORMATS.values())
            raise InputError(
                f"{place}: expected the keys of a format ({keys}), got {shorten(list(first))}"
            )
        name = fitting[0]
    row = FORMATS[name]
    for place, record in records:
        missing = [key for key in row.keys if key not in record]
        if missing:
            raise InputError(
                f"{place}: expected {', '.join(row.keys)}, as {name} has, found no {missing[0]}"
            )
    return name, [row.read(record, place) for place, record in records]


# --- metrics


def _accuracy(divide_by: Callable[[str, "Score"], float]) -> Callable[..., float]:
    def metric(examples: Sequence[Example], scores: Sequence[Sequence["Score"]]) -> float:
        hits = [
            np.argmax(
                [
                    score.log_likelihood / divide_by(choice, score)
                    for choice, score in zip(example.choices, found, strict=True)
                ]
            )
            == example.label
            for example, found in zip(examples, scores, strict=True)
        ]
        return float(np.mean(hits))

    return metric


def _last_word_accuracy(examples: Sequence[Example], scores: Sequence[Sequence["Score"]]) -> float:
    return float(np.mean([found[0].is_greedy for found in scores]))


def _last_word_perplexity(
    examples: Sequence[Example], scores: Sequence[Sequence["Score"]]
) -> float:
    # The result may be too large for a float.
    with np.errstate(over="ignore"):
        return float(np.exp(-np.mean([found[0].log_likelihood for found in scores])))


# Name -> function of the examples and the scores of their choices.
METRICS = {
    "accuracy_sum": _accuracy(lambda choice, score: 1.0),
    "accuracy_per_token": _accuracy(lambda choice, score: score.num_tokens),
    "accuracy_per_character": _accuracy(lambda choice, score: len(choice.removeprefix(" ")) or 1),
    "last_word_accuracy": _last_word_accuracy,
    "last_word_perplexity": _last_word_perplexity,
}
