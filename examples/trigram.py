"""A trigram model of tokens, as a baseline for `tritium eval perplexity`.

    python examples/trigram.py DATASET TEXT ...

DATASET is a folder of `tritium data build`. The model counts the tokens of its training split, and
predicts each TEXT with the tokenizer of the dataset. It prints the values that `tritium eval
perplexity` prints.

    p(w | u v) = max(c(u v w) - d, 0) / c(u v) + d n(u v) / c(u v) p(w | v)
    p(w | v)   = max(c(v w) - d, 0) / c(v) + d n(v) / c(v) p(w)
    p(w)       = (c(w) + 1) / (N + V)

c counts occurrences, n counts the different tokens that follow, d = 0.75 (absolute discounting).
"""

import math
import sys
from pathlib import Path

import numpy as np

from tritium.train.data.dataset import open_dataset
from tritium.train.eval.texts import read_text

DISCOUNT = 0.75


class Counts:
    """How often each token follows each context. Keys are numbers below 2**63."""

    def __init__(self, contexts: np.ndarray, tokens: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        self.keys, self.counts = np.unique(contexts * vocab_size + tokens, return_counts=True)
        self.contexts, first, self.totals = _groups(self.keys // vocab_size, self.counts)
        self.followers = np.diff(np.append(first, len(self.keys)))

    def interpolate(self, contexts: np.ndarray, tokens: np.ndarray, lower: np.ndarray):
        """Return the probabilities of tokens after contexts. `lower`: with shorter contexts."""
        count = _look_up(self.keys, self.counts, contexts * self.vocab_size + tokens)
        total = _look_up(self.contexts, self.totals, contexts)
        followers = _look_up(self.contexts, self.followers, contexts)
        is_known = total > 0
        total = np.maximum(total, 1)
        found = np.maximum(count - DISCOUNT, 0) / total + DISCOUNT * followers / total * lower
        return np.where(is_known, found, lower)


def _groups(contexts: np.ndarray, counts: np.ndarray):
    """Return the different contexts, the first place of each, and the sum of its counts."""
    different, first = np.unique(contexts, return_index=True)
    return different, first, np.add.reduceat(counts, first)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the values of the wanted keys, 0 for missing ones."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


class Trigram:
    """A trigram model with absolute discounting."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        self.unigrams = np.bincount(tokens, minlength=vocab_size) + 1
        self.vocab_size = vocab_size
        pair = tokens[:-2] * vocab_size + tokens[1:-1]
        self.bigrams = Counts(tokens[:-1], tokens[1:], vocab_size)
        self.trigrams = Counts(pair, tokens[2:], vocab_size)

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Return -log p of each token but the first, in nats."""
        before, last = tokens[:-1], tokens[1:]
        found = self.unigrams[last] / self.unigrams.sum()
        found = self.bigrams.interpolate(before, last, found)
        # The first target has one token of context only.
        pair = tokens[:-2] * self.vocab_size + tokens[1:-1]
        found[1:] = self.trigrams.interpolate(pair, tokens[2:], found[1:])
        return -np.log(found)


def main(dataset_path: str, *texts: str) -> None:
    """Train on a dataset, and print the perplexity of texts."""
    dataset = open_dataset(dataset_path)
    vocab_size = dataset.tokenizer.vocab_size
    model = Trigram(dataset.train.read(0, len(dataset.train)).astype(np.int64), vocab_size)
    for path in texts:
        text = read_text(Path(path), dataset.tokenizer, vocab_size)
        losses = np.concatenate(
            [model.losses(each.read(0, len(each)).astype(np.int64)) for each in text.sequences]
        )
        loss = losses.mean()
        nats = loss * text.tokens
        print(
            f"{path}: {loss:.4f} nats per token over {len(losses):,} tokens, perplexity "
            f"{math.exp(loss):.2f} per token, {math.exp(nats / text.words):.2f} per word, "
            f"{nats / text.bytes / math.log(2):.4f} bits per byte"
        )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/trigram.py DATASET TEXT ...")
    main(*sys.argv[1:])
