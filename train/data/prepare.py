"""The data half in one place: `build`, `open_dataset`, `prepare`, `Loader`, `evaluation_batches`.

`prepare` turns whatever a user named (a dataset, files, folders, stdlib) into a dataset folder, kept in a cache so that the
second run starts at once. The parts are in tokenizer.py, corpus.py, shards.py, dataset.py, build.py and loader.py.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from .build import build
from .corpus import Corpus
from .dataset import FORMAT_VERSION, Dataset, DatasetInfo, SplitInfo, open_dataset, read_info
from .loader import Loader, evaluation_batches
from .shards import TokenStream
from .tokenizer import DEFAULT_TOKENIZER, from_spec, needs_corpus

__all__ = [
    "Dataset",
    "DatasetInfo",
    "Loader",
    "SplitInfo",
    "TokenStream",
    "build",
    "cache_dir",
    "evaluation_batches",
    "open_dataset",
    "prepare",
]


def prepare(
    data: Sequence[str],
    tokenizer: str | None,
    cache_dir: Path | str,
    *,
    held_out: float = 0.1,
    progress: bool = True,
) -> Path:
    """The dataset folder for what a user named: itself if it is one, else built once and kept in the cache.

    Args:    data: one dataset folder, or inputs as for `build`.   tokenizer: spec; None: the dataset's own, or bpe:4096.
             cache_dir: where built datasets are kept; see `cache_dir()`.
    Returns: a folder for `open_dataset`. Changed input files, another tokenizer or fraction give another folder.
    Raises:  InputError as `build`, or if the dataset was built with another tokenizer than the one asked for.
    """
    if len(data) == 1 and (Path(data[0]) / "dataset.json").is_file():
        path = Path(data[0])
        if tokenizer is not None and not _same_tokenizer(read_info(path), tokenizer):
            raise InputError(
                f"{path}: expected a dataset of tokenizer {tokenizer}, this one has {read_info(path).tokenizer}; "
                "leave the tokenizer out, or build another dataset"
            )
        return path
    spec = DEFAULT_TOKENIZER if tokenizer is None else tokenizer
    corpus = Corpus(data)
    key = [corpus.fingerprint(), _spec_identity(spec), held_out, FORMAT_VERSION]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{Path(data[0]).stem or 'data'}-{Path(spec).stem}")
    target = Path(cache_dir) / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if not (target / "dataset.json").is_file():
        try:
            build(target, data, spec, held_out=held_out, progress=progress)
        except OSError:
            if not (
                target / "dataset.json"
            ).is_file():  # else another process was quicker: its folder is as good
                raise
    return target


def _same_tokenizer(info: DatasetInfo, spec: str) -> bool:
    if needs_corpus(spec) or info.tokenizer == spec:
        return info.tokenizer == spec
    return from_spec(spec, list).sha256 == info.tokenizer_sha256


def _spec_identity(spec: str) -> str:
    """A file stands for its content, any other spec for itself."""
    return from_spec(spec, list).sha256 if spec.endswith(".tiktoken") else spec


def cache_dir() -> Path:
    """Where built datasets are kept: $TRITIUM_HOME, else `tritium` in the platform's cache folder; not created here."""
    if home := os.environ.get("TRITIUM_HOME"):
        return Path(home)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tritium"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tritium"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritium"
