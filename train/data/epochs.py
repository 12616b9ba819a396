"""How often a run reads its corpus."""

import functools

from ...errors import InputError, plural
from ..config import TrainConfig
from .documents.corpus import Corpus
from .documents.sources import SOURCES, Download

# Repeating data up to about four times is almost as good as new data (arXiv:2305.16264).
MOST_EPOCHS = 4
# Estimate for byte pairs: English in GPT-2's vocabulary, and Python code in one that it learned.
_BYTES_PER_TOKEN = 4


def describe_epochs(tokens: int, corpus_tokens: int, dropout: float) -> str:
    """Return one line: the epochs of a run, and advice if there are too many.

    Args:
        tokens: that the run trains on.
        corpus_tokens: in the training split.
        dropout: probability of the model.
    """
    epochs = tokens / max(1, corpus_tokens)
    line = f"{plural(epochs, 'epoch', '.3g')}: {tokens:,} tokens from a corpus of {corpus_tokens:,}"
    if epochs <= MOST_EPOCHS:
        return line
    advice = "give more data or fewer steps"
    return f"{line}; above {MOST_EPOCHS} " + (
        f"a model learns less from each: {advice}"
        if dropout
        else f"a model begins to memorize: {advice}, or set dropout to 0.1 or 0.2"
    )


def estimate_corpus_tokens(config: TrainConfig) -> int | None:
    """Estimate the tokens of the training split without reading text. None: there is no estimate.

    The estimate is a known count, or the size of the files divided by 4 bytes per token.
    """
    try:
        total = sum(_tokens(name, config.tokenizer, config.text_field) for name in config.data)
    except (InputError, OSError):  # the files may be missing
        return None
    return round(total * (1 - config.held_out))


@functools.lru_cache
def _tokens(name: str, tokenizer: str | None, text_field: str) -> float:
    bytes_per_token = 1 if tokenizer in ("bytes", "chars") else _BYTES_PER_TOKEN
    source = SOURCES.get(name)
    if source is None:
        return Corpus([name], text_field=text_field).total_bytes / bytes_per_token
    if isinstance(source, Download):
        return source.size / bytes_per_token
    return source.tokens
