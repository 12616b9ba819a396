"""Choose the documents of a corpus: filters, near duplicates, and the weights of a mixture.

Documents pass these stages in this order. The first stage that drops a document is its reason.

    filters          drop a document by a value of its text (filters.py)
    near duplicates  drop a document that is similar to an earlier one (near_duplicates.py)
    mixture          drop documents of inputs that are too large for their weight, evenly

The corpus itself drops exact duplicates first. The result depends on the documents and the options
only, not on the number of threads.

Weights are proportions of characters. The input that is scarcest for its weight is kept completely,
and no document is used twice. So weights 3 and 1 for inputs of 600 and 100 characters keep 300 and
100.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ....errors import InputError
from .corpus import Corpus, Document, batches_of_text
from .filters import apply_filters
from .near_duplicates import NearDuplicates, check_similarity, signatures
from .text_batch import TextBatch

_BATCH_CHARACTERS = 1 << 20
_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 80
_KEPT = 0
NEAR_DUPLICATES = "near duplicates"
MIXTURE = "mixture"

Documents = Callable[[], Iterator[Document]]


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Which documents of the corpus to keep. The default keeps all.

    Attributes:
        filters: the threshold of each filter, by name.
        near_duplicates: similarity from which a document counts as a repetition. 0: none does.
        weights: proportion of the characters of each input. (): as they come.
    """

    filters: dict[str, float | str] = field(default_factory=dict)
    near_duplicates: float = 0.0
    weights: tuple[float, ...] = ()

    def check(self, inputs: int) -> None:
        """Raise InputError for a similarity or weights that do not fit `inputs` inputs."""
        check_similarity(self.near_duplicates)
        if not self.weights:
            return
        if len(self.weights) != inputs:
            raise InputError(
                f"weights: expected one number for each of the {inputs} inputs, got "
                f"{len(self.weights)}"
            )
        if not all(0 <= weight < float("inf") for weight in self.weights) or not sum(self.weights):
            raise InputError(
                "weights: expected numbers of 0 or more, finite, and one above 0, got "
                f"{' '.join(f'{weight:g}' for weight in self.weights)}"
            )


@dataclass(kw_only=True)
class Dropped:
    """The documents that one stage dropped.

    Attributes:
        reason: the name of the filter, "near duplicates" or "mixture".
        documents, characters: how many, and their size.
        examples: the first few: where they come from, the value that decided, their first words.
    """

    reason: str
    documents: int = 0
    characters: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, document: Document, value: str) -> None:
        """Count a document."""
        self.documents += 1
        self.characters += len(document.text)
        if len(self.examples) < _EXAMPLES:
            start = " ".join(document.text[: 4 * _EXAMPLE_CHARACTERS].split())
            example = {"source": document.source, "value": value}
            self.examples.append(example | {"text": start[:_EXAMPLE_CHARACTERS]})


class Selection:
    """The documents of a corpus that remain. Each call of `documents` gives the same ones.

    The first complete pass decides and remembers one byte per document. Near duplicates and weights
    need a pass of their own before the first document.

    Args:
        corpus: the source.
        options: what to keep.
        folder: for temporary files.
        threads: number of threads that compute values and signatures.
    Attributes:
        options: what to keep.
        dropped: one record per stage, after the first complete pass.
    """

    def __init__(self, corpus: Corpus, options: SelectionOptions, folder: Path, threads: int = 1):
        options.check(len(corpus.inputs))
        self._corpus = corpus
        self.options = options
        self._folder = folder
        self._threads = threads
        # Per document: _KEPT, 1 + index of a filter, or one of the next two.
        self._codes: bytearray | None = None
        self._near_code = len(options.filters) + 1
        self._mixture_code = len(options.filters) + 2
        self._repeats: dict[int, int] = {}  # the first near duplicates, and what they repeat
        self._by_filters: list[Dropped] = []
        self.dropped: list[Dropped] = []

    def decide(self, source: Documents) -> None:
        """Run the pass that near duplicates and weights need, if they are on.

        Args and Raises: see `documents`.
        """
        if self._codes is None and (self.options.near_duplicates or self.options.weights):
            self._decide(source)

    def documents(self, source: Documents | None = None) -> Iterator[Document]:
        """Yield the documents that remain.

        Args: source: gives the documents of the corpus, for example with a progress bar.
        Raises: InputError if no document remains, or the files changed since the last pass.
        """
        options = self.options
        source = source or self._corpus.documents
        if not (options.filters or options.near_duplicates or options.weights):
            yield from source()
            return
        self.decide(source)
        if self._codes is None:
            yield from self._decide_and_yield(source)
        else:
            yield from self._decided(source)

    def _decided(self, source: Documents) -> Iterator[Document]:
        """Yield what an earlier pass kept. Count the near duplicates and the mixture."""
        near, mixture = Dropped(reason=NEAR_DUPLICATES), Dropped(reason=MIXTURE)
        sources = dict.fromkeys(self._repeats.values(), "")
        pairs = itertools.zip_longest(source(), self._codes)
        for position, (document, code) in enumerate(pairs):
            if document is None or code is None:
                raise InputError(
                    f"data: expected {len(self._codes):,} documents in "
                    f"{' '.join(self._corpus.inputs)} as before, got another number; the files "
                    "changed while they were read"
                )
            if position in sources:
                sources[position] = document.source
            if code == _KEPT:
                yield document
            elif code == self._near_code:
                earlier = sources.get(self._repeats.get(position), "")
                near.add(document, f"repeats {earlier}")
            elif code == self._mixture_code:
                mixture.add(document, "")
        self.dropped = [*self._by_filters]
        self.dropped += [near] if self.options.near_duplicates else []
        self.dropped += [mixture] if self.options.weights else []

    # --- decide

    def _decide_and_yield(self, source: Documents) -> Iterator[Document]:
        """Apply the filters and yield what remains."""
        codes = bytearray()
        dropped = [Dropped(reason=name) for name in self.options.filters]
        for batch, batch_codes, _ in self._filtered(source, dropped):
            codes += batch_codes.tobytes()
            yield from itertools.compress(batch, batch_codes == _KEPT)
        _check_some_remain(codes, self._corpus)
        self._codes = codes
        self.dropped = self._by_filters = dropped

    def _decide(self, source: Documents) -> None:
        """Decide about all documents, in one pass."""
        codes = bytearray()
        sizes: list[np.ndarray] = []
        inputs: list[np.ndarray] = []
        dropped = [Dropped(reason=name) for name in self.options.filters]
        similarity = self.options.near_duplicates
        near = NearDuplicates(self._folder, similarity) if similarity else None
        try:
            for batch, batch_codes, rows in self._filtered(source, dropped):
                codes += batch_codes.tobytes()
                if near is not None:
                    near.add(rows[batch_codes == _KEPT])
                if self.options.weights:
                    sizes.append(np.array([len(document.text) for document in batch]))
                    inputs.append(np.array([document.input for document in batch], np.uint16))
            decided = np.frombuffer(codes, np.uint8)
            if near is not None:
                self._drop_repeated(decided, near.find())
        finally:
            if near is not None:
                near.delete()
        if self.options.weights:
            self._drop_for_weights(decided, np.concatenate(sizes), np.concatenate(inputs))
        _check_some_remain(codes, self._corpus)
        self._codes = codes
        self._by_filters = dropped

    def _drop_repeated(self, codes: np.ndarray, repeats: np.ndarray) -> None:
        kept = np.flatnonzero(codes == _KEPT)
        later = np.flatnonzero(repeats >= 0)
        codes[kept[later]] = self._near_code
        first = later[:_EXAMPLES]
        self._repeats = dict(zip(kept[first].tolist(), kept[repeats[first]].tolist(), strict=True))

    def _drop_for_weights(self, codes: np.ndarray, sizes: np.ndarray, inputs: np.ndarray) -> None:
        weights = self.options.weights
        places = [np.flatnonzero((codes == _KEPT) & (inputs == i)) for i in range(len(weights))]
        characters = [int(sizes[place].sum()) for place in places]
        for name, weight, count in zip(self._corpus.inputs, weights, characters, strict=True):
            if weight and not count:
                raise InputError(
                    f"weights: expected text in {name}, which has weight {weight:g}, got none"
                )
        scale = min(
            count / weight for count, weight in zip(characters, weights, strict=True) if weight
        )
        for place, count, weight in zip(places, characters, weights, strict=True):
            fraction = scale * weight / count if weight else 0.0
            due = 0.0  # characters to keep so far, less the kept ones
            for position, size in zip(place.tolist(), sizes[place].tolist(), strict=True):
                due += fraction * size
                if fraction and due >= size / 2:
                    due -= size
                else:
                    codes[position] = self._mixture_code

    def _filtered(
        self, source: Documents, dropped: Sequence[Dropped]
    ) -> Iterator[tuple[list[Document], np.ndarray, np.ndarray | None]]:
        """Yield batches of documents, their codes by the filters, and their signatures.

        Threads work on the next batches while one is used. `dropped` counts by filter.
        """
        options = self.options
        batches = batches_of_text(source(), _BATCH_CHARACTERS)
        for batch, (results, rows) in _map_batches(batches, options, self._threads):
            codes = np.zeros(len(batch), np.uint8)
            for code, (name, record) in enumerate(zip(results, dropped, strict=True), 1):
                values, drops = results[name]
                now = np.flatnonzero(drops & (codes == _KEPT))
                codes[now] = code
                for i in now.tolist():
                    value = values[i]
                    record.add(batch[i], value if isinstance(value, str) else f"{value:.3g}")
            yield batch, codes, rows


def _check_some_remain(codes: bytearray, corpus: Corpus) -> None:
    if _KEPT not in codes:
        raise InputError(
            f"data: expected documents of {' '.join(corpus.inputs)} that pass the filters, got "
            f"none of {len(codes):,}; change the thresholds"
        )


def _map_batches(
    batches: Iterator[list[Document]], options: SelectionOptions, threads: int
) -> Iterator[tuple[list[Document], tuple[dict, np.ndarray | None]]]:
    """Yield each batch with the results of `_examine`, in order."""
    waiting: deque[tuple[list[Document], Future]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(_examine, batch, options)))
            if len(waiting) > threads:
                batch, task = waiting.popleft()
                yield batch, task.result()
        for batch, task in waiting:
            yield batch, task.result()


def _examine(
    documents: list[Document], options: SelectionOptions
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray | None]:
    """Return the results of the filters, and signatures if near duplicates are looked for."""
    batch = TextBatch([document.text for document in documents])
    rows = signatures(batch) if options.near_duplicates else None
    return apply_filters(batch, options.filters), rows
