"""Encoders of tritium's own tokenizers.

Each converts text without lone surrogates to ids of an unsigned dtype.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ....errors import InputError

# tiktoken fails on a run of 1,000,000 spaces. Such text is encoded in parts of this length.
_STEP_CHARACTERS = 1 << 19


def encode_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def chars_encoder(pieces: Sequence[bytes]) -> Callable[[str], np.ndarray]:
    """Return the encoder for a vocabulary of characters: ids are their indices in `pieces`."""
    characters = np.array([ord(piece.decode()) for piece in pieces], dtype=np.uint32)
    unknown = len(characters)
    # A table from code point to id. Its last entry stands for all larger code points.
    ids = np.full(int(characters.max()) + 2, unknown, dtype=np.uint32)
    ids[characters] = np.arange(len(characters), dtype=np.uint32)

    def encode(text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        found = ids[np.minimum(points, len(ids) - 1)]
        missing = np.flatnonzero(found == unknown)
        if missing.size:
            character = text[missing[0]]
            raise InputError(
                f"tokenizer chars: expected one of the {len(characters)} characters of its corpus, "
                f"got {character!r} (U+{ord(character):04X}) at character {missing[0]}; remove it, "
                "or use the tokenizer bytes, gpt2 or bpe:SIZE"
            )
        return found

    return encode


def bpe_encoder(pieces: Sequence[bytes], pattern: str) -> Callable[[str], np.ndarray]:
    """Return the encoder that splits text by `pattern` and merges pairs of bytes into `pieces`."""
    import tiktoken

    encoding = tiktoken.Encoding(
        "byte pairs",
        pat_str=pattern,
        mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
        special_tokens={},
    )
    encode_once = encoding.encode_to_numpy

    def encode(text: str) -> np.ndarray:
        try:
            return encode_once(text)
        except ValueError:
            starts = range(0, len(text), _STEP_CHARACTERS)
            return np.concatenate(
                [encode_once(text[start : start + _STEP_CHARACTERS]) for start in starts]
            )

    return encode
