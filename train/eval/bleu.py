"""BLEU of generated texts against references, with sacrebleu (extra `eval`).

A line of the jsonl file is {"prompt": TEXT, "reference": TEXT}, or "references": a list of texts.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...errors import InputError, unknown_name
from ...model import GPT
from ...model.generation import Sampling
from ..data.tokenizers.tokenizer import Tokenizer
from ..generation.text import answer_text, encode_prompt, for_tokenizer
from ..storage.records import shorten
from .jsonl import read_jsonl, text_of

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU


class Pair(NamedTuple):
    """A prompt, and texts that are right answers."""

    prompt: str
    references: list[str]


def open_bleu(tokenize: str = "13a") -> "BLEU":
    """Return sacrebleu's metric.

    Args: tokenize: a name of sacrebleu for how it splits texts into words.
    Raises: InputError if sacrebleu or a package for the tokenization is not installed, or if
        sacrebleu does not know the name.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        raise InputError(
            "eval bleu: expected an installed sacrebleu, found none; pip install 'tritium[eval]'"
        )
    from sacrebleu.metrics import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        raise InputError(f"tokenize: {unknown_name('name', tokenize, BLEU.TOKENIZERS)}")
    try:
        return BLEU(tokenize=tokenize)
    except (ImportError, RuntimeError) as error:  # it says what to install
        raise InputError(f"tokenize: {' '.join(str(error).split())}") from None


def read_pairs(path: Path) -> list[Pair]:
    """Read a jsonl file. Raises: InputError, which names the line, if one does not fit."""
    pairs = []
    for place, record in read_jsonl(path):
        prompt = text_of(record, "prompt", place)
        if "references" not in record:
            references = [text_of(record, "reference", place)]
        else:
            references = record["references"]
            is_texts = isinstance(references, list) and all(
                isinstance(each, str) and each.strip() for each in references
            )
            if not is_texts or not references:
                raise InputError(
                    f"{place}: references: expected a list of texts, got {shorten(references)}"
                )
        if pairs and len(pairs[0].references) != len(references):
            raise InputError(
                f"{place}: expected {len(pairs[0].references)} references, as in the first line, "
                f"got {len(references)}"
            )
        pairs.append(Pair(prompt, references))
    return pairs


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    batch_size: int,
    report: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Continue each prompt, up to a stop text. A prompt that is too long loses its first tokens."""
    sampling = for_tokenizer(sampling, tokenizer)
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        encoded = [
            encode_prompt(tokenizer, prompt)[-model.config.context_tokens :]
            for prompt in prompts[start : start + batch_size]
        ]
        continued = model.generate(encoded, sampling=sampling, tokenizer=tokenizer)
        for prompt, tokens in zip(encoded, continued, strict=True):
            text = answer_text(tokenizer, prompt, tokens)
            for stop in sampling.stop:
                text = text.split(stop)[0]
            texts.append(text)
        report(len(encoded))
    return texts


def bleu(metric: "BLEU", texts: Sequence[str], pairs: Sequence[Pair]) -> dict[str, float | str]:
    """Return the BLEU of texts, 0 to 100, and sacrebleu's signature, which names its options."""
    references = [list(column) for column in zip(*(pair.references for pair in pairs), strict=True)]
    found = metric.corpus_score([text.strip() for text in texts], references)
    return {"bleu": found.score, "signature": str(metric.get_signature())}
