"""Check a dataset completely: checksums, vocabulary, and the counts that dataset.json records."""

from pathlib import Path

import numpy as np

from ...errors import InputError, describe_os_error
from .dataset import SPLITS, Dataset, open_dataset, read_info
from .shards import Shard
from .tokenizers.tokenizer import Tokenizer


def verify_dataset(path: Path | str) -> Dataset:
    """Check every file of a dataset.

    Each shard: header, size, checksum, tokens inside the vocabulary. The dataset: its tokenizer,
    and the tokens, documents and bytes of each split.

    Raises: InputError that names all shards that are damaged, or the count that is wrong.
    """
    path = Path(path)
    info = read_info(path)
    damaged = []
    for split in SPLITS:
        for name in getattr(info, split).shards:
            try:
                Shard(path / name)
            except InputError as error:
                damaged.append((name, str(error)))
            except OSError as error:
                damaged.append((name, describe_os_error(error)))
    if damaged:
        names = ", ".join(name for name, _ in damaged[1:])
        more = f"; also damaged: {names}" if names else ""
        raise InputError(f"{damaged[0][1]}{more}")

    dataset = open_dataset(path)
    for split in SPLITS:
        _check_counts(dataset, split)
    return dataset


def _check_counts(dataset: Dataset, split: str) -> None:
    """Compare the documents and bytes of a split with its record. open_dataset compares tokens."""
    info = getattr(dataset.info, split)
    sizes = piece_bytes(dataset.tokenizer)
    documents = size = 0
    for tokens in getattr(dataset, split).pieces():
        documents += int(np.count_nonzero(tokens == dataset.tokenizer.end_of_text))
        size += int(sizes[tokens].sum())
    # No end-of-text follows the last document of a split that was cut inside a document.
    if not info.documents - 1 <= documents <= info.documents:
        raise InputError(
            f"{dataset.path}: expected {info.documents:,} {split} documents, got {documents:,} "
            "end-of-text tokens; build it again"
        )
    # A published tokenizer may change text, for example add a space.
    if dataset.tokenizer.kind != "published" and size != info.bytes:
        raise InputError(
            f"{dataset.path}: expected {info.bytes:,} bytes of {split} text, its tokens have "
            f"{size:,}; build it again"
        )


def piece_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the bytes of text that each token stands for, (vocabulary,); 0 for end-of-text."""
    sizes = np.array([len(piece) for piece in tokenizer.pieces])
    sizes[tokenizer.end_of_text] = 0
    return sizes
