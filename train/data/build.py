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

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.progress import TaskID

from ...errors import InputError
from ..config import TrainConfig, check_held_out
from ..storage.files import seal, write_whole
from ..terminal.progress import progress_bars
from ._new_folder import check_unused, new_locked_folder
from ._split_writer import Part, SplitWriter
from .bin_shards import build_from_bins, find_bins
from .dataset import FORMAT_VERSION, SPLITS, DatasetInfo, SplitInfo
from .documents.corpus import Corpus, Document, batches_of_text
from .documents.selection import Selection, SelectionOptions
from .tokenizers.tokenizer import DEFAULT_TOKENIZER, Tokenizer, cut, from_spec

# With 100 documents and held_out 0.1, the validation split is empty with probability 0.9**100: once
# in 37,000 corpora.
_FEW_DOCUMENTS = 100
_SHARD_TOKENS = 1 << 26  # 128 MiB of uint16
_PART_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 1 << 24
_KEEP_ALL = SelectionOptions()


def build(
    out_dir: Path | str,
    inputs: Sequence[str | Path],
    tokenizer: str = DEFAULT_TOKENIZER,
    *,
    held_out: float = TrainConfig.held_out,
    shard_tokens: int = _SHARD_TOKENS,
    text_field: str = "text",
    selection: SelectionOptions = _KEEP_ALL,
    threads: int | None = None,
    progress: bool = True,
) -> DatasetInfo:
    """Convert text to a dataset folder. After an error there is no partial folder.

    Args:
        out_dir: a folder that does not exist or is empty.
        inputs: files, folders, stdlib, python (see documents/corpus.py), or token shards
            (bin_shards.py).
        tokenizer: spec (see tokenizers/tokenizer.py).
        held_out: fraction of the documents for the validation split, in (0, 1).
        shard_tokens: maximum number of tokens per shard.
        text_field: key or column that holds the text (see documents/corpus.py).
        selection: filters, near duplicates and weights of the inputs.
        threads: number of threads. None: one per core. The result does not depend on it.
        progress: whether to show a progress bar on stderr if it is a terminal.
    Raises: InputError for bad input, an out_dir that is in use, or a split without text; OSError if
        a file cannot be read or written. After an error or Ctrl-C no file is left behind, but
        parent folders of out_dir may be.
    """
    out_dir = Path(out_dir)
    _check_numbers(held_out, shard_tokens, threads)
    check_unused(out_dir)
    if paths := find_bins(inputs):
        _check_no_selection(selection)
        return build_from_bins(
            out_dir, paths, tokenizer, held_out=held_out, shard_tokens=shard_tokens
        )
    corpus = Corpus(inputs, text_field=text_field)
    threads = threads or _cores()

    with new_locked_folder(out_dir) as folder, _Progress(corpus, progress) as bars:
        chosen = Selection(corpus, selection, folder, threads)
        chosen.decide(lambda: bars.documents("selecting"))
        made = from_spec(
            tokenizer,
            lambda: (each.text for each in chosen.documents(bars.documents_to_learn_from)),
        )
        writers = {split: SplitWriter(folder, split, made, shard_tokens) for split in SPLITS}
        parts = _assign_splits(chosen, bars.documents_to_encode, held_out, made.can_cut)
        _write_tokens(writers, parts, made, threads, bars)

        splits = {split: writers[split].close(corpus.inputs) for split in SPLITS}
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


def _check_no_selection(selection: SelectionOptions) -> None:
    if selection != _KEEP_ALL:
        raise InputError(
            "data: expected no filters, near_duplicates or weights with token shards, which are "
            "not text; leave them out"
        )


def _check_numbers(held_out: float, shard_tokens: int, threads: int | None) -> None:
    check_held_out(held_out)
    if shard_tokens < 1:
        raise InputError(
            f"shard_tokens: expected 1 or more, got {shard_tokens}; {_SHARD_TOKENS} is usual"
        )
    if threads is not None and threads < 1:
        raise InputError(f"threads: expected 1 or more, got {threads}")


class _Progress:
    """Context manager that gives the documents of the corpus, with a progress bar per pass."""

    def __init__(self, corpus: Corpus, show: bool):
        self._corpus = corpus
        self._bars = progress_bars()
        self._bars.disable = self._bars.disable or not show
        self._encoding = None

    def __enter__(self) -> "_Progress":
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def documents(self, label: str) -> Iterator[Document]:
        """Yield the documents, and show how much of the input has been read."""
        task = self._add(label)
        shown = 0
        for document in self._corpus.documents():
            # Update once per half percent. An update for each of a million documents takes
            # longer than reading them.
            if self._corpus.bytes_read - shown > self._corpus.total_bytes // 200:
                shown = self._corpus.bytes_read
                self._bars.update(task, completed=shown)
            yield document
        self._bars.update(task, completed=self._corpus.total_bytes)

    def documents_to_learn_from(self) -> Iterator[Document]:
        """Yield the documents from which a vocabulary is learned."""
        yield from self.documents("learning vocabulary")
        # rustbpe merges pairs after the last document. It holds Python's lock: no bar moves.
        self._bars.update(self._bars.task_ids[-1], note="merging", refresh=True)

    def documents_to_encode(self) -> Iterator[Document]:
        """Yield the documents to encode. `encoded` moves the bar."""
        self._encoding = self._add("tokenizing")
        yield from self._corpus.documents()

    @property
    def bytes_read(self) -> int:
        """Number of bytes of the input that this pass has read."""
        return self._corpus.bytes_read

    def encoded(self, bytes_read: int) -> None:
        """Show that the first `bytes_read` bytes of the input are encoded."""
        self._bars.update(self._encoding, completed=bytes_read)

    def _add(self, label: str) -> TaskID:
        for task in self._bars.task_ids:
            self._bars.update(task, note="")
        return self._bars.add_task(label, total=self._corpus.total_bytes, note="")


# --- split


def _assign_splits(
    chosen: Selection,
    documents: Callable[[], Iterator[Document]],
    held_out: float,
    can_cut: bool,
) -> Iterator[Part]:
    """Assign each document to the splits and cut it into parts that threads can encode.

    Args:
        documents: gives the documents of the corpus to `chosen`.
        can_cut: whether the tokenizer encodes the parts of a document as it does the document.
    """
    lengths = _lengths_if_few(chosen)
    if lengths is None:
        for document in chosen.documents(documents):
            is_held_out = int.from_bytes(document.digest[:8], "big") < held_out * 2**64
            split = "val" if is_held_out else "train"
            yield from _parts(split, document.text, can_cut, add_end=True)
        return

    train_characters = int(sum(lengths) * (1 - held_out))  # still to assign to train
    for number, document in enumerate(chosen.documents(documents), 1):
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


def _parts(split: str, text: str, can_cut: bool, add_end: bool) -> Iterator[Part]:
    if not text:
        return
    texts = list(cut(text, _PART_CHARACTERS)) if can_cut else [text]
    last = len(texts) - 1
    for i, part in enumerate(texts):
        yield Part(split, part, i == 0, add_end and i == last)


# --- encode and write


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write_tokens(
    writers: dict[str, SplitWriter],
    parts: Iterable[Part],
    tokenizer: Tokenizer,
    threads: int,
    bars: _Progress,
) -> None:
    """Encode in threads and write in order. While a batch is encoded, the next one is read."""

    def write(batch: list[Part], bytes_read: int, task: Future) -> None:
        for part, ids in zip(batch, task.result(), strict=True):
            writers[part.split].add(part, ids)
        bars.encoded(bytes_read)

    # Batches of at most a second, so that the bar moves.
    characters = min(_BATCH_CHARACTERS, threads * _PART_CHARACTERS)
    with ThreadPoolExecutor(1) as background:
        waiting = None
        for batch in batches_of_text(parts, characters):
            task = background.submit(tokenizer.encode_batch, [part.text for part in batch], threads)
            if waiting:
                write(*waiting)
            waiting = batch, bars.bytes_read, task
        if waiting:
            write(*waiting)
