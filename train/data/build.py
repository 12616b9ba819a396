"""Build a dataset folder: read documents, split, encode on all cores, write shards.

End-of-text follows each document. A published tokenizer's start tokens, such as Llama's, precede
it. The splits are made in one of two ways.

100 documents or more: a document is held out if the hash of its text, as a fraction, is below
`held_out`. The choice depends on the text of the document only, not on other documents or on order.

Fewer than 100 documents, for example one book: the hash could leave a split empty. So the text
itself is cut, and the last `held_out` fraction of all characters is held out. End-of-text is
inserted between documents only, not after the last. tinyshakespeare then has its usual 1,003,854
and 111,540 characters, and no token that occurs only once.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from ..files import flush_folder, seal, write_whole
from ..lock import FolderLock, delete_abandoned
from .corpus import Corpus, Document
from .dataset import FORMAT_VERSION, SPLITS, DatasetInfo, SplitInfo
from .selection import Selection, SelectionOptions
from .shards import token_dtype, write_shard
from .tokenizer import DEFAULT_TOKENIZER, Tokenizer, cut, from_spec

# With 100 documents and held_out 0.1, the validation split is empty with probability 0.9**100: once
# in 37,000 corpora.
_FEW_DOCUMENTS = 100
_SHARD_TOKENS = 1 << 26  # 128 MiB of uint16
_PART_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 1 << 24
_KEEP_ALL = SelectionOptions()
_PART_OVERHEAD = 64  # characters counted per part, to limit a batch of very short documents too


def build(
    out_dir: Path | str,
    inputs: Sequence[str | Path],
    tokenizer: str = DEFAULT_TOKENIZER,
    *,
    held_out: float = 0.1,
    shard_tokens: int = _SHARD_TOKENS,
    text_field: str = "text",
    selection: SelectionOptions = _KEEP_ALL,
    threads: int | None = None,
    progress: bool = True,
) -> DatasetInfo:
    """Convert text to a dataset folder. After an error there is no partial folder.

    Args:
        out_dir: a folder that does not exist or is empty.
        inputs: files, folders, stdlib, python (see corpus.py).
        tokenizer: spec (see tokenizer.py).
        held_out: fraction of the documents for the validation split, in (0, 1).
        shard_tokens: largest number of tokens per shard.
        text_field: key or column that holds the text (see corpus.py).
        selection: filters, near duplicates and weights of the inputs.
        threads: number of threads. None: one per core. The result does not depend on it.
        progress: whether to show a progress bar on stderr if it is a terminal.
    Raises: InputError for bad input, an out_dir that is in use, or a split without text; OSError if
        a file cannot be read or written. After an error or Ctrl-C no file is left behind, but
        parent folders of out_dir may be.
    """
    out_dir = Path(out_dir)
    _check_numbers(held_out, shard_tokens, threads)
    _check_unused(out_dir)
    corpus = Corpus(inputs, text_field=text_field)
    threads = threads or _cores()

    with _new_folder(out_dir) as folder, _Progress(corpus, progress) as read:
        chosen = Selection(corpus, selection, folder, threads)

        def documents(label: str) -> Iterator[Document]:
            return chosen.documents(lambda: read(label))

        made = from_spec(
            tokenizer, lambda: (document.text for document in documents("learning vocabulary"))
        )
        writers = {split: _SplitWriter(folder, split, made, shard_tokens) for split in SPLITS}
        parts = _assign_splits(chosen, documents, held_out, made.can_cut)
        _write_tokens(writers, parts, made, threads)

        splits = {split: writers[split].close(corpus) for split in SPLITS}
        info = _describe(corpus, chosen, made, held_out, splits)
        made.save(folder / "tokenizer.json")
        write_whole(folder / "dataset.json", [seal(dataclasses.asdict(info))])
    return info


def _describe(
    corpus: Corpus,
    chosen: Selection,
    tokenizer: Tokenizer,
    held_out: float,
    splits: dict[str, SplitInfo],
) -> DatasetInfo:
    return DatasetInfo(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        **splits,
        held_out=held_out,
        duplicates_dropped=corpus.duplicates,
        files_skipped=corpus.skipped_files,
        inputs=corpus.inputs,
        text_field=corpus.text_field,
        filters=chosen.options.filters,
        near_duplicates=chosen.options.near_duplicates,
        weights=list(chosen.options.weights),
        dropped=chosen.dropped,
    )


def _check_numbers(held_out: float, shard_tokens: int, threads: int | None) -> None:
    if not 0 < held_out < 1:
        raise InputError(
            f"held_out: expected a number between 0 and 1, got {held_out}; 0.1 is usual"
        )
    if shard_tokens < 1:
        raise InputError(
            f"shard_tokens: expected 1 or more, got {shard_tokens}; {_SHARD_TOKENS} is usual"
        )
    if threads is not None and threads < 1:
        raise InputError(f"threads: expected 1 or more, got {threads}")


def _check_unused(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(
            f"data: expected a new or empty folder to build in, got {out_dir}, which is in use; "
            "choose another"
        )


@contextlib.contextmanager
def _new_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder. Rename it to `out_dir` at the end; delete it after an error.

    The lock of the folder tells other builds that it is in use. They delete folders without a lock,
    which killed builds left behind.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(out_dir.parent, ".*.tmp")
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".tmp", dir=out_dir.parent)
    )
    try:
        with FolderLock(temporary):
            yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp gives access to the owner only
        if out_dir.is_dir():
            out_dir.rmdir()  # it is empty; Windows cannot rename over a folder
        os.rename(temporary, out_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_folder(out_dir.parent)


def _umask() -> int:
    mask = os.umask(0o022)  # the only way to read it is to set it
    os.umask(mask)
    return mask


class _Progress:
    """Context manager that gives `documents(label)`: the corpus's documents, with a progress bar.

    The bar shows how much of the input has been read.
    """

    def __init__(self, corpus: Corpus, show: bool):
        from rich.console import Console
        from rich.progress import Progress

        self._corpus = corpus
        console = Console(file=sys.stderr)
        self._bars = Progress(console=console, disable=not (show and console.is_terminal))

    def __enter__(self) -> Callable[[str], Iterator[Document]]:
        self._bars.start()
        return self._documents

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def _documents(self, label: str) -> Iterator[Document]:
        task = self._bars.add_task(label, total=self._corpus.total_bytes)
        shown = 0
        for document in self._corpus.documents():
            # Update once per half percent. An update for each of a million documents takes
            # longer than reading them.
            if self._corpus.bytes_read - shown > self._corpus.total_bytes // 200:
                shown = self._corpus.bytes_read
                self._bars.update(task, completed=shown)
            yield document
        self._bars.update(task, completed=self._corpus.total_bytes)


# --- split


class _Part(NamedTuple):
    """A piece of a document.

    split: "train" or "val".
    starts_document: whether it is the first piece of the document in its split.
    ends_document: whether end-of-text follows it.
    """

    split: str
    text: str
    starts_document: bool
    ends_document: bool


def _assign_splits(
    chosen: Selection,
    documents: Callable[[str], Iterator[Document]],
    held_out: float,
    can_cut: bool,
) -> Iterator[_Part]:
    """Assign each document to the splits and cut it into parts that threads can encode.

    Args: can_cut: whether the tokenizer encodes the parts of a document as it does the document.
    """
    lengths = _lengths_if_few(chosen)
    if lengths is None:
        for document in documents("tokenizing"):
            is_held_out = int.from_bytes(document.digest[:8], "big") < held_out * 2**64
            split = "val" if is_held_out else "train"
            yield from _parts(split, document.text, can_cut, add_end=True)
        return

    train_characters = int(sum(lengths) * (1 - held_out))  # still to assign to train
    for number, document in enumerate(documents("tokenizing"), 1):
        head = document.text[:train_characters]
        tail = document.text[train_characters:]
        train_characters -= len(head)
        is_last = number == len(lengths)
        yield from _parts("train", head, can_cut, add_end=not is_last and not tail)
        yield from _parts("val", tail, can_cut, add_end=not is_last)


def _lengths_if_few(chosen: Selection) -> list[int] | None:
    """Count the characters of each document; None if there are _FEW_DOCUMENTS or more."""
    lengths = []
    for document in chosen.documents():
        lengths.append(len(document.text))
        if len(lengths) == _FEW_DOCUMENTS:
            return None
    return lengths


def _parts(split: str, text: str, can_cut: bool, add_end: bool) -> Iterator[_Part]:
    if not text:
        return
    texts = list(cut(text, _PART_CHARACTERS)) if can_cut else [text]
    last = len(texts) - 1
    for i, part in enumerate(texts):
        yield _Part(split, part, i == 0, add_end and i == last)


# --- encode and write


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write_tokens(
    writers: dict[str, "_SplitWriter"], parts: Iterable[_Part], tokenizer: Tokenizer, threads: int
) -> None:
    """Encode in threads and write in order. While a batch is encoded, the next one is read."""

    def write(batch: list[_Part], encoded: list[np.ndarray]) -> None:
        for part, ids in zip(batch, encoded, strict=True):
            writers[part.split].add(part, ids)

    with ThreadPoolExecutor(1) as background:
        waiting = None
        for batch in _batches(parts):
            task = background.submit(tokenizer.encode_batch, [part.text for part in batch], threads)
            if waiting:
                write(waiting[0], waiting[1].result())
            waiting = batch, task
        if waiting:
            write(waiting[0], waiting[1].result())


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text) + _PART_OVERHEAD
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


class _SplitWriter:
    """Collects the tokens of one split and writes a shard each time one is full."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int):
        self._folder = folder
        self._split = split
        self._tokenizer = tokenizer
        self._buffer = np.empty(shard_tokens, token_dtype(tokenizer.vocab_size))
        self._filled = 0
        self._info = SplitInfo()

    def add(self, part: _Part, ids: np.ndarray) -> None:
        self._info.documents += part.starts_document
        self._info.bytes += len(part.text) if part.text.isascii() else len(part.text.encode())
        if part.starts_document:
            self._append(np.array(self._tokenizer.start_tokens, dtype=ids.dtype))
        self._append(ids)
        if part.ends_document:
            self._append(np.array([self._tokenizer.end_of_text], dtype=ids.dtype))

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

    def close(self, corpus: Corpus) -> SplitInfo:
        """Write the last shard. Raises: InputError if the split has no tokens."""
        if self._filled:
            self._flush()
        if not self._info.tokens:
            raise InputError(
                f"data: expected text for the {self._split} split of {' '.join(corpus.inputs)}, "
                "got none; give more text or another held_out"
            )
        return self._info
