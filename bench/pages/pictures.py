"""tritium bench pictures: draw the pictures of docs/images from the code and bench/results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from ...train.commands.cli import parse
from ...train.storage.records import check_names
from .. import ROOT
from ..record import check_checkout
from . import _attention, _matmuls, _rows, _talk
from ._style import save, style

IMAGES = ROOT / "docs" / "images"
# Name of the file -> function that draws it.
PICTURES: dict[str, Callable[[], Figure]] = {
    "attention-forward": _attention.forward,
    "attention-backward": _attention.backward,
    "attention-varlen": _attention.varlen,
    "attention-decode": _attention.decode_splits,
    "norm": _rows.norms,
    "rotary": _rows.rope,
    "embedding": _rows.embedding_runs,
    "cross-entropy": _rows.logits,
    "linear-cross-entropy": _matmuls.loss_chunks,
    "gemm": _matmuls.gemm_order,
    "block-bytes": _talk.block_bytes,
    "predicted-step": _talk.predicted_step,
    "throughput": _talk.throughput,
    "equal-time": _talk.equal_time,
}


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Options of `tritium bench pictures`."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Pictures; default: all."""
    out: str | None = None
    """Folder; default: docs/images."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench pictures`. Returns: exit status."""
    about = "Draw the pictures of docs/images from the code and bench/results."
    options = parse(PictureOptions, argv, prog="tritium bench pictures", description=about)
    check_checkout("tritium bench pictures")
    check_names("picture", options.names, PICTURES)
    folder = IMAGES if options.out is None else Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        path = folder / f"{name}.svg"
        with style():
            save(PICTURES[name](), path)
        print(f"written: {path}")
    return 0
