"""Collect the tokens of a split and write its shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from .dataset import SplitInfo
from .shards import write_shard
from .tokenizers.tokenizer import Tokenizer


class Part(NamedTuple):
    """A piece of a document.

    split: "train" or "val".
    starts_document: whether it is the first piece of the document in its split.
    ends_document: whether end-of-text follows it.
    """

    split: str
    text: str
    starts_document: bool
    ends_document: bool


class SplitWriter:
    """Collects the tokens of one split and writes a shard each time one is full."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int):
        self._folder = folder
        self._split = split
        self._tokenizer = tokenizer
        self._buffer = np.empty(shard_tokens, tokenizer.dtype)
        self._filled = 0
        self._info = SplitInfo()

    def add(self, part: Part, ids: np.ndarray) -> None:
        """Add the ids of a part, and count it."""
        self._info.documents += part.starts_document
        self._info.bytes += len(part.text) if part.text.isascii() else len(part.text.encode())
        if part.starts_document:
            self._append(np.array(self._tokenizer.start_tokens, dtype=ids.dtype))
        self._append(ids)
        if part.ends_document:
            self._append(np.array([self._tokenizer.end_of_text], dtype=ids.dtype))

    def add_tokens(self, tokens: np.ndarray, piece_bytes: np.ndarray) -> None:
        """Add tokens whose documents each begin with end-of-text.

        Args: piece_bytes: (vocabulary,) the bytes of text that each token stands for.
        """
        self._info.documents += int(np.count_nonzero(tokens == self._tokenizer.end_of_text))
        self._info.bytes += int(piece_bytes[tokens].sum())
        self._append(tokens)

    def _append(self, ids: np.ndarray) -> None:
        self._info.tokens += len(ids)
        while len(ids):
            fitting = ids[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(fitting)] = fitting
            self._filled += len(fitting)
            ids = ids[len(fitting) :]
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        name = f"{self._split}-{len(self._info.shards):05d}.bin"
        tokens = self._buffer[: self._filled]
        write_shard(self._folder / name, tokens, self._tokenizer.vocab_size, self._tokenizer.sha256)
        self._info.shards.append(name)
        self._filled = 0

    def close(self, inputs: Sequence[str]) -> SplitInfo:
        """Write the last shard. Raises: InputError if the split has no tokens."""
        if self._filled:
            self._flush()
        if not self._info.tokens:
            raise InputError(
                f"data: expected text for the {self._split} split of {' '.join(inputs)}, "
                "got none; give more text or another held_out"
            )
        return self._info
