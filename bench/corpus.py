"""Measure `tritium data build`: the speed of each stage on one core, and the memory of a build.

    python -m tritium.bench.corpus --megabytes 100 --tokenizer gpt2.tiktoken

The corpus is synthetic: documents of about 2,000 characters, with words of a vocabulary of 50,000
in Zipf's distribution. One in twenty is an earlier document with 5 % of its words changed.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..train.data.build import build
from ..train.data.documents.corpus import Corpus
from ..train.data.documents.filters import apply_filters, parse_filters
from ..train.data.documents.near_duplicates import USUAL_SIMILARITY, NearDuplicates, signatures
from ..train.data.documents.selection import SelectionOptions
from ..train.data.documents.text_batch import TextBatch
from ..train.data.shards import write_shard
from ..train.data.tokenizers.tokenizer import from_spec

_VOCABULARY = 50_000
_DOCUMENT_WORDS = 330
_BATCH = 500
_FILTERS = ("length", "repetition", "symbols")


def write_corpus(path: Path, megabytes: float) -> None:
    """Write a synthetic jsonl file of about this size."""
    rng = np.random.default_rng(0)
    letters = "".join(rng.choice(list("etaoinshrdlucmfwypvbgk"), 10 * _VOCABULARY))
    lengths = rng.integers(2, 10, _VOCABULARY).tolist()
    vocabulary = [letters[10 * i : 10 * i + length] for i, length in enumerate(lengths)]
    vocabulary = np.array(vocabulary, dtype=object)
    odds = 1 / np.arange(1, _VOCABULARY + 1)
    sums = np.cumsum(odds / odds.sum())
    written = 0
    earlier = None
    with open(path, "w") as file:
        while written < megabytes * 1e6:
            ids = np.searchsorted(sums, rng.random((_BATCH, _DOCUMENT_WORDS)))
            ids = np.minimum(ids, _VOCABULARY - 1)
            if earlier is not None:
                copies = slice(0, _BATCH // 20)
                is_kept = rng.random((_BATCH // 20, _DOCUMENT_WORDS)) > 0.05
                ids[copies] = np.where(is_kept, earlier[copies], ids[copies])
            earlier = ids[::-1]
            for words in vocabulary[ids].tolist():
                written += file.write(json.dumps({"text": " ".join(words) + "."}) + "\n")


def stage_speeds(source: Path, folder: Path, tokenizer_spec: str) -> dict[str, float]:
    """Return the megabytes of text per second of each stage, on one core."""
    tokenizer = from_spec(tokenizer_spec, list)
    seconds = {}

    began = time.process_time()
    documents = list(Corpus([source]).documents())
    seconds["read"] = time.process_time() - began
    texts = [document.text for document in documents]
    batches = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]

    began = time.process_time()
    thresholds = parse_filters(_FILTERS)
    for batch in batches:
        apply_filters(TextBatch(batch), thresholds)
    seconds["filter"] = time.process_time() - began

    began = time.process_time()
    near = NearDuplicates(folder, USUAL_SIMILARITY)
    for batch in batches:
        near.add(signatures(TextBatch(batch)))
    near.find()
    seconds["near duplicates"] = time.process_time() - began

    began = time.process_time()
    tokens = np.concatenate([ids for batch in batches for ids in tokenizer.encode_batch(batch, 1)])
    seconds["tokenize"] = time.process_time() - began

    began = time.process_time()
    write_shard(folder / "shard.bin", tokens, tokenizer.vocab_size, tokenizer.sha256)
    seconds["write"] = time.process_time() - began

    megabytes = sum(map(len, texts)) / 1e6
    return {name: megabytes / each for name, each in seconds.items()}


def build_memory(source: Path, folder: Path, tokenizer_spec: str) -> tuple[float, float]:
    """Build with all filters. Returns: seconds, and megabytes of memory above the start."""
    before = _peak_megabytes()
    options = SelectionOptions(filters=parse_filters(_FILTERS), near_duplicates=USUAL_SIMILARITY)
    began = time.perf_counter()
    info = build(folder / "dataset", [source], tokenizer_spec, selection=options)
    for each in info.dropped:
        print(f"dropped by {each.reason}: {each.documents:,} documents")
    return time.perf_counter() - began, _peak_megabytes() - before


def _peak_megabytes() -> float:
    """The largest memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def main(argv: Sequence[str] | None = None) -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--stages", type=float, default=50, help="megabytes for the stages")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "corpus.jsonl"
        write_corpus(source, options.megabytes)
        seconds, megabytes = build_memory(source, folder, options.tokenizer)
        print(f"build of {source.stat().st_size / 1e6:,.0f} MB: {seconds:,.0f} s, "
              f"{megabytes:,.0f} MB of memory above the start")  # fmt: skip
        write_corpus(source, options.stages)
        for stage, speed in stage_speeds(source, folder, options.tokenizer).items():
            print(f"{stage:16} {speed:8.1f} MB/s per core")


if __name__ == "__main__":
    main()
