"""Texts to evaluate on: files, jsonl files, datasets and token shards.

    FILE               one document: UTF-8 text
    FILE.jsonl         a document per line, in one field of its object
    DATASET            the validation split of a folder that `tritium data build` wrote
    FILE.bin           a token shard, also one of llm.c or modded-nanogpt

A document begins with the token that starts documents, so that its first token is predicted too. A
split or a shard is one sequence of tokens. It has end-of-text tokens between its documents, and its
first token is not predicted.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..data.bin_shards import is_bin, read_bin
from ..data.dataset import open_dataset
from ..data.shards import Shard, TokenStream
from ..data.tokenizers.tokenizer import Tokenizer
from ..storage.files import hash_file
from .jsonl import read_jsonl, read_utf8, text_of

# Tokens that are decoded at once to count words.
_PIECE_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text as sequences of tokens, and its size.

    Attributes:
        path: where it is.
        sha256: of the file, or of dataset.json, which has the checksums of the shards' tokens.
        sequences: one per document, or one for all documents.
        tokens: number of tokens of the text, without tokens that were added to it.
        bytes: of UTF-8. None: there is no tokenizer to decode the tokens.
        words: separated by whitespace. None as for bytes.
    """

    path: Path
    sha256: str
    sequences: list[TokenStream]
    tokens: int
    bytes: int | None
    words: int | None


def read_text(
    path: Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    counting: str = "exact",
    text_field: str = "text",
) -> Text:
    """Read a text.

    Args:
        path: file or folder. The top of this file lists the types.
        tokenizer: of the model. Token shards need none.
        vocab_size: of the model.
        counting: huggingface: documents begin with the tokens that the tokenizer adds to a text,
            which are none for GPT-2.
        text_field: key of the objects in a jsonl file that holds the text.
    Raises: InputError if it is not a text, or has tokens of another tokenizer; OSError.
    """
    if (path / "dataset.json").is_file():
        return _read_dataset(path, tokenizer, vocab_size)
    if path.is_dir():
        raise InputError(
            f"{path}: expected a file of text, a jsonl file, a token shard or a dataset, got a "
            "folder without dataset.json"
        )
    if is_bin(path):
        return _stream_text(path, TokenStream([read_bin(path, vocab_size)]), tokenizer)
    if path.suffix == ".bin":
        return _read_shard(path, tokenizer, vocab_size)
    if tokenizer is None:
        raise InputError(
            "eval perplexity: expected a model with a tokenizer, got one without; name it with "
            f"`tokenizer`, or give token shards instead of {path}"
        )
    if path.suffix == ".jsonl":
        documents = [text_of(record, text_field, place) for place, record in read_jsonl(path)]
    else:
        documents = [read_utf8(path)]
    start = list(tokenizer.start_tokens)
    if counting == "exact" and not start:
        start = [tokenizer.end_of_text]
    encoded = [tokenizer.encode(document) for document in documents]
    prefix = np.array(start, tokenizer.dtype)
    return Text(
        path=path,
        sha256=hash_file(path),
        sequences=[TokenStream([np.concatenate([prefix, tokens])]) for tokens in encoded],
        tokens=sum(map(len, encoded)),
        bytes=sum(len(document.encode("utf-8", "surrogatepass")) for document in documents),
        words=sum(len(document.split()) for document in documents),
    )


def _read_dataset(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> Text:
    dataset = open_dataset(path)
    _check_tokens(path, dataset.tokenizer.sha256, dataset.info.vocab_size, tokenizer, vocab_size)
    return Text(
        path=path,
        sha256=hash_file(path / "dataset.json"),
        sequences=[dataset.val],
        tokens=len(dataset.val),
        bytes=dataset.info.val.bytes,
        words=_count(dataset.val, dataset.tokenizer)[1],
    )


def _read_shard(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> Text:
    shard = Shard(path)
    _check_tokens(path, shard.tokenizer_sha256, shard.vocab_size, tokenizer, vocab_size)
    return _stream_text(path, TokenStream([shard]), tokenizer)


def _stream_text(path: Path, stream: TokenStream, tokenizer: Tokenizer | None) -> Text:
    """Return a token shard as a text. Without a tokenizer its bytes and words are not known."""
    num_bytes, words = (None, None) if tokenizer is None else _count(stream, tokenizer)
    return Text(
        path=path,
        sha256=hash_file(path),
        sequences=[stream],
        tokens=len(stream),
        bytes=num_bytes,
        words=words,
    )


def _check_tokens(
    path: Path, sha256: str, found: int, tokenizer: Tokenizer | None, vocab_size: int
) -> None:
    if tokenizer is not None and tokenizer.sha256 != sha256:
        raise InputError(
            f"{path}: expected tokens of the model's tokenizer {tokenizer.sha256[:12]}, got "
            f"{sha256[:12]}; build the dataset with the tokenizer of the model"
        )
    if found > vocab_size:
        raise InputError(
            f"{path}: expected a vocabulary of at most {vocab_size} tokens, as the model has, got "
            f"{found}"
        )


def _count(stream: TokenStream, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the bytes and the words of tokens. End-of-text has no byte, and ends a word."""
    end = tokenizer.end_of_text
    num_bytes = 0
    words = 0
    is_in_word = False
    for piece in stream.pieces(_PIECE_TOKENS):
        for document in np.split(piece, np.flatnonzero(piece == end)):
            if len(document) and document[0] == end:
                document = document[1:]
                is_in_word = False
            encoded = tokenizer.decode_bytes(document)
            num_bytes += len(encoded)
            text = encoded.decode("utf-8", "replace")
            words += len(text.split())
            if text:
                # A word may be split over two pieces.
                words -= is_in_word and not text[0].isspace()
                is_in_word = not text[-1].isspace()
    return num_bytes, words
