"""Several documents as one array of bytes, so that numpy finds and hashes all words at once."""

import functools
from collections.abc import Sequence

import numpy as np

# Filters and near-duplicate removal look at the start of a very long document only. A batch then
# needs less than 200 MB, however long a document is.
_LONGEST = 1 << 20
# An odd number, so that it has an inverse modulo 2**64.
_BASE = 0x9E3779B97F4A7C15
_HASH_BITS = np.uint64(40)  # leaves 24 bits for the index of a document in its batch

_BYTES = np.arange(256)
_LOWER = np.array([ord(chr(i).lower()) if i < 128 else i for i in range(256)], np.uint64)
_IS_SPACE = np.isin(_BYTES, list(b" \t\n\r\v\f"))
# A byte from 128 is part of a character that is not ASCII. It counts as a letter.
_IS_WORD = np.array([i >= 128 or chr(i).isalnum() for i in range(256)])
_IS_FIRST = (_BYTES & 0xC0) != 0x80  # the first byte of a character
_IS_SYMBOL = ~_IS_SPACE & ~_IS_WORD


class TextBatch:
    """Documents and their words. A word is a run of letters and digits; case is ignored.

    Attributes:
        texts: the documents, cut after about one million characters.
        characters: (documents,) int64, the length of each uncut document.
        words: (n,) uint64, the hash of each word, in order.
        documents: (n,) int64, the index of each word's document.
    """

    def __init__(self, texts: Sequence[str]):
        self.characters = np.array([len(text) for text in texts], np.int64)
        self.texts = [text[:_LONGEST] for text in texts]
        encoded = [text.encode() for text in self.texts]
        # The newline after each document ends its last word.
        self._content = np.frombuffer(b"".join(part + b"\n" for part in encoded), np.uint8)
        self._ends = np.cumsum([len(part) + 1 for part in encoded])
        is_word = np.zeros(len(self._content) + 1, bool)
        is_word[1:] = _IS_WORD[self._content]
        edges = np.flatnonzero(is_word[1:] != is_word[:-1])
        starts = edges[::2]
        self.words = _hash_words(self._content, starts, edges[1::2])
        self.documents = np.searchsorted(self._ends, starts, side="right")

    def __len__(self) -> int:
        return len(self.texts)

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Hash each run of `size` words inside a document.

        Returns: hashes, (m,) uint64; the index of each run's document, (m,) int64, sorted.
        """
        count = max(0, len(self.words) - size + 1)
        hashes = np.zeros(count, np.uint64)
        for i in range(size):
            hashes *= np.uint64(_BASE)
            hashes += self.words[i : i + count]
        last = self.documents[len(self.documents) - count :]
        is_inside = self.documents[:count] == last
        return mix(hashes[is_inside]), last[is_inside]

    def symbol_shares(self) -> np.ndarray:
        """Return the fraction of the characters that are ASCII symbols, (documents,).

        Spaces do not count as characters here.
        """
        symbols = self._count(_IS_SYMBOL)
        characters = self._count(_IS_FIRST & ~_IS_SPACE)
        return symbols / np.maximum(characters, 1)

    def repeated_shares(self, size: int) -> np.ndarray:
        """Return the fraction of the runs of `size` words that occurred before, (documents,)."""
        hashes, documents = self.ngrams(size)
        # One sort finds equal runs of the same document: the index of the document is in front.
        keys = np.sort(
            (documents.astype(np.uint64) << _HASH_BITS) | (hashes >> (np.uint64(64) - _HASH_BITS))
        )
        is_repeated = keys[1:] == keys[:-1]
        repeated = np.bincount(
            (keys[1:][is_repeated] >> _HASH_BITS).astype(np.int64), minlength=len(self)
        )
        return repeated / np.maximum(np.bincount(documents, minlength=len(self)), 1)

    def _count(self, table: np.ndarray) -> np.ndarray:
        """Count the bytes of each document for which `table` is true."""
        starts = np.concatenate([[0], self._ends[:-1]])
        return np.add.reduceat(table[self._content], starts, dtype=np.int64)


def _hash_words(content: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hash bytes [start, end) of each word: the sum of byte * _BASE**i, i from the word's start."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    powers, inverses = _powers(max(1 << 16, 1 << len(content).bit_length()))
    sums = np.zeros(len(content) + 1, np.uint64)
    np.cumsum(_LOWER[content] * powers[: len(content)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` powers of _BASE and of its inverse, modulo 2**64."""
    bases = (_BASE, pow(_BASE, -1, 1 << 64))
    both = [np.full(count, base, np.uint64) for base in bases]
    for powers in both:
        powers[0] = 1
        np.cumprod(powers, out=powers)
    return both[0], both[1]


def mix(x: np.ndarray) -> np.ndarray:
    """Spread the bits of hashes (the last steps of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
