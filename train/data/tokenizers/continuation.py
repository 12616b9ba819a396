"""The ids of a text that continues another one."""

from collections.abc import Callable

import numpy as np

from .tokenizer import Tokenizer


def encode_continuation(
    tokenizer: Tokenizer,
    text: str,
    piece: str,
    before: list[int],
    encode: Callable[[str], np.ndarray] | None = None,
) -> list[int]:
    """Return the ids of `piece` where it follows `text`, whose ids are `before`.

    Some tokenizers put a space before a text. A piece that is encoded alone would begin with it.

    Args:
        encode: encodes a text. Default: tokenizer.encode.
    """
    encode = encode or tokenizer.encode
    if not tokenizer.can_cut:
        joined = encode(text + piece).tolist()
        if joined[: len(before)] == before:
            return joined[len(before) :]
    return encode(piece).tolist()
