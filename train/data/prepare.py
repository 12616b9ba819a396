"""Find or build the dataset folder for the data that a user names: a dataset, files, stdlib, ...

Built datasets are kept in a cache, so a second run with the same data starts at once.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from ..config import TrainConfig
from ..storage.cache import cache_dir
from .bin_shards import find_bins
from .build import build
from .dataset import FORMAT_VERSION, DatasetInfo, read_info
from .documents.corpus import Corpus, fingerprint
from .tokenizers.tokenizer import DEFAULT_TOKENIZER, from_spec, needs_corpus


def prepare_for(config: TrainConfig, *, progress: bool) -> Path:
    """Return the dataset folder of a run, as `prepare` does. Built datasets are in the cache."""
    return prepare(
        config.data,
        config.tokenizer,
        cache_dir() / "datasets",
        held_out=config.held_out,
        text_field=config.text_field,
        progress=progress,
    )


def prepare(
    data: Sequence[str],
    tokenizer: str | None,
    cache: Path | str,
    *,
    held_out: float = TrainConfig.held_out,
    text_field: str = "text",
    progress: bool = True,
) -> Path:
    """Return a dataset folder. A dataset is returned as it is; other inputs are built once.

    Args:
        data: one dataset folder, or inputs for `build`.
        tokenizer: spec. None: the dataset's own, or bpe:4096.
        cache: folder in which built datasets are kept.
        held_out, text_field, progress: see `build`.
    Returns: a folder for `open_dataset`. Changed files, another tokenizer or another held_out give
        another folder.
    Raises: InputError as `build` does, or if a dataset has another tokenizer than `tokenizer`.
    """
    if is_dataset(data):
        path = Path(data[0])
        info = read_info(path)
        if tokenizer is not None and not _same_tokenizer(info, tokenizer):
            raise InputError(
                f"{path}: expected a dataset of tokenizer {tokenizer}, this one has "
                f"{info.tokenizer}; leave the tokenizer out, or build another dataset"
            )
        return path

    spec = DEFAULT_TOKENIZER if tokenizer is None else tokenizer
    key = [
        _fingerprint(data, text_field),
        _spec_identity(spec),
        held_out,
        FORMAT_VERSION,
    ]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{Path(data[0]).stem or 'data'}-{Path(spec).stem}")
    target = Path(cache) / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if not (target / "dataset.json").is_file():
        try:
            build(target, data, spec, held_out=held_out, text_field=text_field, progress=progress)
        except OSError:
            # If another process has built the same dataset in the meantime, use it.
            if not (target / "dataset.json").is_file():
                raise
    return target


def _fingerprint(data: Sequence[str], text_field: str) -> str:
    if paths := find_bins(data):
        return fingerprint(paths, text_field)
    return Corpus(data, text_field=text_field).fingerprint()


def is_dataset(data: Sequence[str]) -> bool:
    """Return whether `data` names a dataset folder, and not inputs for `build`."""
    return len(data) == 1 and (Path(data[0]) / "dataset.json").is_file()


def _same_tokenizer(info: DatasetInfo, spec: str) -> bool:
    if needs_corpus(spec):
        return info.tokenizer == spec
    # Compare files and folders by their content: their names do not tell. gpt2 is a download.
    is_same_download = spec == info.tokenizer == "gpt2"
    return is_same_download or from_spec(spec, list).sha256 == info.tokenizer_sha256


def _spec_identity(spec: str) -> str:
    """Return the hash of a tokenizer in a file or folder, or the spec itself."""
    is_name = needs_corpus(spec) or spec in ("bytes", "gpt2")
    return spec if is_name else from_spec(spec, list).sha256
