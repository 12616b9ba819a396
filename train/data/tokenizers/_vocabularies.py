"""Vocabularies of tokenizer.py: lists of pieces that are learned, downloaded or read from a file.

No list holds end-of-text. Every function raises InputError if it cannot make its list.
"""

import base64
import binascii
import sys
from collections.abc import Iterable
from pathlib import Path

from ....errors import InputError

# Quantifiers that never need to backtrack are possessive (`++`). The matches are the same, and the
# regular expression engine needs no backtracking stack.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"
# The pattern for learned vocabularies follows GPT-4's. A run of spaces is one piece, so indentation
# becomes one token. Punctuation keeps its line end. A number is split into pieces of two digits,
# because the 1,000 numbers of three digits would fill a quarter of a vocabulary of 4,096.
LEARNED_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def single_bytes() -> list[bytes]:
    return [bytes([i]) for i in range(256)]


def learn_chars(texts: Iterable[str]) -> list[bytes]:
    """Return the sorted characters of the texts, in UTF-8."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise InputError("tokenizer chars: expected a corpus with characters, got none; add text")
    return [character.encode() for character in sorted(found)]


def download_gpt2() -> list[bytes]:
    """Return GPT-2's pieces in the order of their ranks."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    # requests has its own exceptions, and tiktoken raises ValueError for a wrong hash.
    except Exception as error:
        raise InputError(
            f"tokenizer gpt2: tiktoken could not download its ranks ({type(error).__name__}); "
            "connect to the internet once, or use a FILE.tiktoken with GPT-2's ranks"
        ) from None
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]


def read_ranks(path: Path) -> list[bytes]:
    """Read lines of base64, a space and a rank. The ranks are 0, 1, 2 ... in any order."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[int(rank)] = base64.b64decode(piece, validate=True)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{path}:{number}: expected base64, a space and a rank (tiktoken's format), "
                f"got {line[:40]!r}"
            ) from None
    if sorted(ranks) != list(range(len(ranks))) or len(set(ranks.values())) != len(ranks):
        raise InputError(
            f"{path}: expected each rank from 0 to {len(ranks) - 1} once, with its own piece; "
            "get the file again"
        )
    missing = set(single_bytes()) - set(ranks.values())
    if missing:
        raise InputError(
            f"{path}: expected all 256 single bytes among the pieces, {len(missing)} are missing; "
            "get the file again"
        )
    return [ranks[i] for i in range(len(ranks))]


def learn_bpe(size: int, texts: Iterable[str]) -> list[bytes]:
    """Learn byte pairs. Returns: size - 1 pieces, in the order of their ranks.

    A small text has fewer pairs. Then there are fewer pieces, and a line on stderr says so.
    """
    import rustbpe

    trainer = rustbpe.Tokenizer()
    # rustbpe holds `buffer_size` documents in memory. Its default of 8,192 would take
    # gigabytes for books.
    trainer.train_from_iterator(iter(texts), size - 1, buffer_size=256, pattern=LEARNED_PATTERN)
    pieces = [bytes(piece) for piece, _ in trainer.get_mergeable_ranks()]
    merges = len(pieces) - 256
    if merges < 1:
        raise InputError(
            f"tokenizer bpe:{size}: expected a corpus that gives merges, got none; add text or use "
            "bytes"
        )
    if merges < size - 257:
        print(
            f"tokenizer bpe:{size}: the text gives only {merges:,} merges, so the vocabulary has "
            f"{len(pieces) + 1:,} tokens",
            file=sys.stderr,
        )
    return pieces


def check_pieces(kind: str, pieces: list[bytes], pattern: str) -> None:
    """Raise ValueError if text cannot be encoded with the pieces of a tokenizer.json.

    tiktoken would end the process for a pattern that matches no characters, or wait for hours.
    """
    vocabulary = pieces[:-1]  # without end-of-text
    if kind == "bytes" and vocabulary != single_bytes():
        raise ValueError("expected the 256 bytes as pieces")
    if kind == "chars" and (not vocabulary or any(len(x.decode()) != 1 for x in vocabulary)):
        raise ValueError("expected a character per piece")
    if kind == "bpe":
        if pattern not in (GPT2_PATTERN, LEARNED_PATTERN):
            raise ValueError(f"expected a pattern of tritium, got {pattern[:60]!r}")
        if len(set(vocabulary)) < len(vocabulary) or not set(single_bytes()) <= set(vocabulary):
            raise ValueError("expected different pieces, and all 256 bytes among them")
