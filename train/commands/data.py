"""tritium data: build a dataset, check one, or write it for other programs."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...errors import InputError, plural, unknown_name
from ..config import TrainConfig
from ..data.bin_shards import export_bins
from ..data.build import build
from ..data.dataset import DatasetInfo, open_dataset
from ..data.documents.filters import describe_filters, parse_filters
from ..data.documents.selection import SelectionOptions
from ..data.tokenizers.tokenizer import DEFAULT_TOKENIZER
from ..data.verify import verify_dataset
from .cli import parse, program

_DESCRIPTION = f"""Convert text to token shards, for `tritium train --data OUT_DIR`.


tritium data verify DATASET           check checksums, vocabulary and counts of a dataset

tritium data export DATASET OUT_DIR   write token shards for llm.c and modded-nanogpt


filters, with their default thresholds:


{describe_filters()}"""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of `tritium data build`."""

    out_dir: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT_DIR")]]
    """Folder to create. It must be new or empty."""
    inputs: tyro.conf.Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="INPUT [INPUT ...]", help_behavior_hint="(required)"),
        ]
    ]
    """Files and folders of txt, md, py, jsonl, jsonl.gz, json, csv, tsv, parquet; stdlib: Python's standard library; python: stdlib and the installed packages; or a corpus such as tinystories."""  # noqa: E501 - --help keeps line breaks
    tokenizer: str = DEFAULT_TOKENIZER
    """bytes, chars, gpt2, FILE.tiktoken, FILE.json, FOLDER of a published model, or bpe:SIZE."""
    held_out: float = TrainConfig.held_out
    """Fraction of the documents held out for validation."""
    text_field: str = "text"
    """Key of json objects, or column of csv, tsv and parquet files, that holds the text."""
    filter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME[=THRESHOLD] ...")] = ()
    """Drop documents by length, repetition, symbols or language; see above. Default: keep all."""
    near_duplicates: float = 0.0
    """Drop documents with this similarity or more to an earlier one, such as 0.4. 0: keep them."""
    weights: tuple[float, ...] = ()
    """Relative number of characters, one number per INPUT. Default: keep everything."""
    threads: int | None = None
    """Number of threads. None: one per core. The result does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `tritium data verify`."""

    dataset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATASET")]]
    """Folder that `tritium data build` wrote."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `tritium data export`."""

    dataset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATASET")]]
    """Folder that `tritium data build` wrote."""
    out_dir: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT_DIR")]]
    """Folder to create. It must be new or empty."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium data build`, `verify` or `export`."""
    if not argv or argv[0] in ("-h", "--help"):
        argv = ["build", "--help"]
    if argv[0] not in _COMMANDS:
        known = [f"data {name}" for name in _COMMANDS]
        raise InputError(unknown_name("command", f"data {argv[0]}", known))
    return _COMMANDS[argv[0]](argv[1:])


def _build(words: Sequence[str]) -> int:
    options = parse(DataOptions, words, prog="tritium data build", description=_DESCRIPTION)
    info = build(
        options.out_dir,
        options.inputs,
        options.tokenizer,
        held_out=options.held_out,
        text_field=options.text_field,
        selection=SelectionOptions(
            filters=parse_filters(options.filter),
            near_duplicates=options.near_duplicates,
            weights=options.weights,
        ),
        threads=options.threads,
    )
    _print_splits(info)
    _print_dropped(info)
    print(f"next: {program()} train --data {shlex.quote(options.out_dir)}")
    return 0


def _print_splits(info: DatasetInfo) -> None:
    for name, split in (("train", info.train), ("held out", info.val)):
        documents = plural(split.documents, "document")
        print(f"{name}: {documents}, {split.tokens:,} tokens, {split.bytes:,} bytes")


def _print_dropped(info: DatasetInfo) -> None:
    print(
        f"dropped {plural(info.duplicates_dropped, 'duplicate document')}, "
        f"skipped {plural(info.files_skipped, 'file')} that cannot be read as UTF-8 text"
    )
    for each in info.dropped:
        size = f"{plural(each.documents, 'document')}, {each.characters:,} characters"
        print(f"dropped by {each.reason}: {size}")
        for example in each.examples:
            value = f" ({example['value']})" if example["value"] else ""
            print(f"    {example['source']}{value}: {example['text']}")


def _verify(words: Sequence[str]) -> int:
    description = "Check the checksums, the vocabulary and the counts of a dataset."
    options = parse(VerifyOptions, words, prog="tritium data verify", description=description)
    dataset = verify_dataset(options.dataset)
    info = dataset.info
    shards = len(info.train.shards) + len(info.val.shards)
    print(
        f"{options.dataset}: {shards:,} shards with {info.train.tokens + info.val.tokens:,} tokens "
        f"match their checksums; all tokens are below {info.vocab_size:,}"
    )
    _print_splits(info)
    return 0


def _export(words: Sequence[str]) -> int:
    description = "Write a dataset as token shards for llm.c and modded-nanogpt."
    options = parse(ExportOptions, words, prog="tritium data export", description=description)
    out_dir = Path(options.out_dir)
    written = export_bins(open_dataset(options.dataset), out_dir)
    for split, tokens in written.items():
        print(f"{out_dir / f'{out_dir.name}_{split}_*.bin'}: {tokens:,} tokens")
    return 0


_COMMANDS = {"build": _build, "verify": _verify, "export": _export}
