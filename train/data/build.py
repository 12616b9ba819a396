"""From text to a dataset folder: read, split, encode on all cores, write shards.

End-of-text follows every document. A document is held out if a hash of its text falls below the `held_out` fraction, so the
choice depends on nothing else: not on order, not on the other documents. Fewer than 100 documents (one book!) would make that
a coin toss; then the text itself is cut, the last fraction of its characters is held out, and end-of-text stands only between
documents, so that tinyshakespeare gives the usual 1,003,854 and 111,540 characters and no token that occurs just once.
"""

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
from .corpus import Corpus, Document
from .dataset import FORMAT_VERSION, SPLITS, DatasetInfo, SplitInfo
from .shards import token_dtype, write_shard
from .tokenizer import DEFAULT_TOKENIZER, Tokenizer, cut, from_spec

# 0.9**100: with the usual fraction no split of 100 documents comes out empty in 30,000 corpora.
_FEW_DOCUMENTS = 100
_SHARD_TOKENS = 1 << 26  # 128 MiB of uint16: few files, yet a second's work to rewrite
_PART_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 1 << 24


def build(
    out_dir: Path | str,
    inputs: Sequence[str | Path],
    tokenizer: str = DEFAULT_TOKENIZER,
    *,
    held_out: float = 0.1,
    shard_tokens: int = _SHARD_TOKENS,
    text_field: str = "text",
    progress: bool = True,
) -> DatasetInfo:
    """Turn text into a dataset folder, written whole or not at all.

    Args:    out_dir: does not exist yet, or is empty.   inputs: files, folders, stdlib, python (see corpus.py).
             tokenizer: spec (see tokenizer.py).   held_out: fraction of documents for the val split, in (0, 1).
             shard_tokens: most tokens in a file.   text_field: jsonl key or parquet column.   progress: bar on stderr.
    Raises:  InputError for bad input, an out_dir in use, or a split without text; OSError as the disk gives it. Nothing is left
             behind by either, nor by Ctrl-C, except folders above out_dir.
    """
    out_dir = Path(out_dir)
    if not 0 < held_out < 1:
        raise InputError(f"data: held_out must lie between 0 and 1, got {held_out}; 0.1 is usual")
    if shard_tokens < 1:
        raise InputError(
            f"data: shard_tokens must be at least 1, got {shard_tokens}; {_SHARD_TOKENS} is usual"
        )
    _refuse_used(out_dir)
    return _build(
        out_dir, Corpus(inputs, text_field=text_field), tokenizer, held_out, shard_tokens, progress
    )


def _refuse_used(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(
            f"data: expected a new or empty folder to build in, got {out_dir}, which is in use; choose another"
        )


def _build(
    out_dir: Path, corpus: Corpus, spec: str, held_out: float, shard_tokens: int, progress: bool
) -> DatasetInfo:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".tmp", dir=out_dir.parent)
    )
    try:
        with _Progress(corpus, progress) as track:
            made = from_spec(
                spec, lambda: (document.text for document in track("learning vocabulary"))
            )
            writers = {
                split: _SplitWriter(temporary, split, made, shard_tokens) for split in SPLITS
            }
            _write_tokens(writers, _assign(corpus, track, held_out), made)
        info = DatasetInfo(
            format_version=FORMAT_VERSION,
            tokenizer=made.name,
            tokenizer_sha256=made.sha256,
            vocab_size=made.vocab_size,
            **{split: writers[split].close(corpus) for split in SPLITS},
            held_out=held_out,
            duplicates_dropped=corpus.duplicates,
            files_skipped=corpus.skipped_files,
            inputs=corpus.inputs,
        )
        made.save(temporary / "tokenizer.json")
        write_whole(temporary / "dataset.json", [seal(dataclasses.asdict(info))])
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are for the owner alone
        if out_dir.is_dir():
            out_dir.rmdir()  # empty; Windows does not rename over it
        os.rename(temporary, out_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_folder(out_dir.parent)
    return info


def _umask() -> int:
    mask = os.umask(0o022)  # it cannot be read without being set
    os.umask(mask)
    return mask


class _Progress:
    """Context manager giving `track(label)`: the corpus's documents behind a bar that shows how much of the input was read."""

    def __init__(self, corpus: Corpus, show: bool):
        from rich.console import Console
        from rich.progress import Progress

        self._corpus = corpus
        console = Console(file=sys.stderr)
        self._bars = Progress(console=console, disable=not (show and console.is_terminal))

    def __enter__(self) -> Callable[[str], Iterator[Document]]:
        self._bars.start()
        return self._track

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def _track(self, label: str) -> Iterator[Document]:
        task = self._bars.add_task(label, total=self._corpus.total_bytes)
        shown = 0
        for document in self._corpus.documents():
            # In steps of half a percent: with a million documents, moving the bar costs more than reading them.
            if self._corpus.bytes_read - shown > self._corpus.total_bytes // 200:
                shown = self._corpus.bytes_read
                self._bars.update(task, completed=shown)
            yield document
        self._bars.update(task, completed=self._corpus.total_bytes)


class _Part(NamedTuple):
    """A stretch of a document; `begins` if it is the first in its split of that document, `closes` if end-of-text follows."""

    split: str
    text: str
    begins: bool
    closes: bool


def _assign(
    corpus: Corpus, track: Callable[[str], Iterator[Document]], held_out: float
) -> Iterator[_Part]:
    """Every document's text, assigned to the splits and cut into parts that threads can share."""
    lengths = _lengths_if_few(corpus)
    if lengths is None:
        for document in track("tokenizing"):
            held = int.from_bytes(document.digest[:8], "big") < held_out * 2**64
            yield from _parts("val" if held else "train", document.text, closes=True)
        return
    left = int(sum(lengths) * (1 - held_out))  # characters that still go to the training split
    for number, document in enumerate(track("tokenizing"), 1):
        head, tail = document.text[:left], document.text[left:]
        left -= len(head)
        closes = number < len(lengths)
        yield from _parts("train", head, closes=closes and not tail)
        yield from _parts("val", tail, closes=closes)


def _lengths_if_few(corpus: Corpus) -> list[int] | None:
    """Characters of each document, or None where there are many; reads no more than it takes to know."""
    lengths = []
    for document in corpus.documents():
        lengths.append(len(document.text))
        if len(lengths) == _FEW_DOCUMENTS:
            return None
    return lengths


def _parts(split: str, text: str, closes: bool) -> Iterator[_Part]:
    if not text:
        return
    texts = list(cut(text, _PART_CHARACTERS))
    for i, part in enumerate(texts):
        yield _Part(split, part, i == 0, closes and i == len(texts) - 1)


def _write_tokens(
    writers: dict[str, "_SplitWriter"], parts: Iterable[_Part], tokenizer: Tokenizer
) -> None:
    """Encode on all cores while the next texts are read; the order of the parts is kept."""
    threads = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )

    def write(batch: list[_Part], ids: list[np.ndarray]) -> None:
        for part, part_ids in zip(batch, ids, strict=True):
            writers[part.split].add(part, part_ids)

    with ThreadPoolExecutor(1) as ahead:
        waiting = None
        for batch in _batches(parts):
            task = ahead.submit(tokenizer.encode_batch, [part.text for part in batch], threads)
            if waiting:
                write(waiting[0], waiting[1].result())
            waiting = batch, task
        if waiting:
            write(waiting[0], waiting[1].result())


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    batch, characters = [], 0
    for part in parts:
        batch.append(part)
        characters += (
            len(part.text) + 64
        )  # what an object costs, so that a million empty lines do not pile up
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Collects one split's tokens and writes a shard whenever one is full."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int):
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._buffer = np.empty(shard_tokens, token_dtype(tokenizer.vocab_size))
        self._filled = 0
        self._info = SplitInfo()

    def add(self, part: _Part, ids: np.ndarray) -> None:
        self._info.documents += part.begins
        self._info.bytes += len(part.text) if part.text.isascii() else len(part.text.encode())
        self._append(ids)
        if part.closes:
            self._append(np.array([self._tokenizer.end_of_text], dtype=ids.dtype))

    def _append(self, ids: np.ndarray) -> None:
        self._info.tokens += len(ids)
        while len(ids):
            taken = ids[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            ids = ids[len(taken) :]
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        name = f"{self._split}-{len(self._info.shards):05d}.bin"
        tokens = self._buffer[: self._filled]
        write_shard(self._folder / name, tokens, self._tokenizer.vocab_size, self._tokenizer.sha256)
        self._info.shards.append(name)
        self._filled = 0

    def close(self, corpus: Corpus) -> SplitInfo:
        if self._filled:
            self._flush()
        if not self._info.tokens:
            raise InputError(
                f"data: expected text for the {self._split} split of {' '.join(corpus.inputs)}, got none; "
                "give more text or another held_out"
            )
        return self._info
