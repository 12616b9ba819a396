"""tritium bench tune: compare the launch sizes of one operator on a GPU.

A variant replaces one constant or plan of a launcher, in forward and backward, while its call runs.
All variants and the shipped sizes ("as shipped") are timed in turn, in the same run. A variant that
does not compile, does not fit or is wrong is named and not timed. The fastest become rows in
kernels/, with device and date next to them.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ...errors import InputError, check_positive
from ...kernels.attention import launch as attention_launch
from ...kernels.loss import launch as loss_launch
from ...kernels.mlp.gemm import Tile
from ...kernels.norm import launch as norm_launch
from ...train.commands.cli import parse
from ...train.machine.device import choose_device, choose_matmul
from ...train.storage.records import check_names
from ...train.terminal.progress import table_console
from ..record import check_writable, write_record
from ..timing import side_stream, time_in_turn
from . import OPERATORS
from .case import Implementation, Operator
from .check import find_error
from .compare import directions_of, rotated_inputs, shapes_of, timed

SHIPPED = "as shipped"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A replacement: `value` takes the place of `target`, "module.name" below kernels/."""

    name: str
    target: str
    value: Any

    @classmethod
    def shipped(cls, target: str) -> "Variant":
        """Return the shipped value as a variant: its calls have the same overhead as others."""
        return cls(name=SHIPPED, target=target, value=getattr(*_place(target)))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make launchers use the variant. As a decorator: during each call."""
        module, name = _place(self.target)
        before = getattr(module, name)
        setattr(module, name, self.value)
        try:
            yield
        finally:
            setattr(module, name, before)


@functools.cache
def _place(target: str) -> tuple[ModuleType, str]:
    module, name = target.rsplit(".", 1)
    return importlib.import_module(f"...kernels.{module}", __package__), name


def _gemm_tile(*sizes: int) -> Variant:
    tile = Tile(*sizes)
    return Variant(
        name=f"tile {sizes}", target="mlp.gemm.plan", value=lambda *_, **__: (tile, True)
    )


def _attention_tile(kernel: str, *sizes: int) -> Variant:
    shipped = attention_launch.plan
    tile = attention_launch.Tile(*sizes)
    return Variant(
        name=f"{kernel} {sizes}",
        target="attention.launch.plan",
        value=lambda wanted, *sizes, **options: (
            tile if wanted == kernel else shipped(wanted, *sizes, **options)
        ),
    )


def _loss_lanes(lanes: int, unroll: int) -> Variant:
    row = loss_launch.Lanes(lanes=lanes, unroll=unroll, programs=0)
    return Variant(
        name=f"{lanes} lanes, {unroll} loads",
        target="loss.launch.LANES",
        value={**loss_launch.LANES, "sm_": (row,)},
    )


def _chunk_rows(rows: int) -> Variant:
    return Variant(
        name=f"chunks of {rows} rows",
        target="loss.linear_cross_entropy.plan",
        value=functools.cache(lambda *_: rows),
    )


def _norm_plan(option: str, value: int) -> Variant:
    shipped = norm_launch.plan
    return Variant(
        name=f"{option} {value}",
        target="norm.launch.plan",
        value=lambda *sizes: shipped(*sizes, **{option: value}),
    )


def _constant(target: str, value: Any) -> Variant:
    return Variant(name=f"{target.rsplit('.', 1)[1]} {value}", target=target, value=value)


# Sizes that the machine code ranks close together, so that only a measurement decides.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "gelu_mlp": (
        Variant(name="cublas", target="mlp.gemm.plan", value=lambda *_, **__: (None, False)),
        _gemm_tile(128, 256, 64, 2, 8, 3),
        _gemm_tile(128, 256, 64, 4, 8, 3),
        # Two programs per multiprocessor.
        *(
            _gemm_tile(*sizes, 2)
            for sizes in (
                (128, 128, 64, 1, 4, 2),
                (128, 128, 64, 2, 4, 2),
                (128, 128, 64, 2, 4, 3),
                (128, 128, 64, 2, 8, 3),
                (128, 128, 64, 4, 8, 3),
                (64, 256, 64, 2, 4, 2),
            )
        ),
        *(_constant("mlp.gemm.GROUP_M", rows) for rows in (4, 16)),
    ),
    "causal_attention": (
        _attention_tile("fwd", 128, 64, 4, 3),
        _attention_tile("fwd", 128, 64, 8, 3),
        _attention_tile("fwd", 128, 128, 8, 2),
        _attention_tile("fwd", 64, 128, 4, 2),
        _attention_tile("fwd", 64, 128, 4, 3),
        _attention_tile("fwd", 64, 64, 4, 2),
        _attention_tile("fwd", 64, 64, 4, 3),
        _attention_tile("fwd", 64, 64, 4, 4),
        _attention_tile("dq", 128, 64, 8, 3),
        _attention_tile("dq", 64, 64, 4, 3),
        _attention_tile("dq", 64, 128, 4, 2),
        _attention_tile("dq", 64, 128, 4, 2, 168),
        _attention_tile("dq", 64, 32, 4, 3),
        _attention_tile("dkdv", 64, 128, 8, 2),
        _attention_tile("dkdv", 64, 64, 4, 2),
        _attention_tile("dkdv", 64, 64, 4, 3, 168),
        _attention_tile("dkdv", 64, 64, 4, 1, 168),
        _attention_tile("dkdv", 64, 64, 4, 2, 128),
        _attention_tile("dkdv", 32, 64, 4, 3, 128),
        _attention_tile("dkdv", 128, 64, 8, 2),
        _attention_tile("dkdv", 64, 128, 8, 2, 128),
        _constant("attention.launch.BACKWARD", "one pass"),
        *(_constant("attention.launch.L2_BYTES", megabytes << 20) for megabytes in (2, 8)),
    ),
    "causal_attention_varlen": (
        _attention_tile("fwd", 64, 64, 4, 2),
        _attention_tile("fwd", 128, 64, 4, 3),
        _attention_tile("dq", 128, 64, 8, 3),
        _attention_tile("dkdv", 64, 64, 4, 2, 168),
        _attention_tile("dkdv", 64, 128, 8, 2),
        _attention_tile("dkdv", 32, 64, 4, 2),
    ),
    "cross_entropy": (
        *(_loss_lanes(128, loads) for loads in (1, 2)),
        *(_loss_lanes(*sizes) for sizes in ((256, 2), (256, 4), (512, 2))),
    ),
    "linear_cross_entropy": (
        *(_loss_lanes(*sizes) for sizes in ((128, 4), (256, 4), (512, 4), (1024, 1))),
        *(_chunk_rows(rows) for rows in (4_096, 5_504, 5_632, 11_264)),
    ),
    "embedding": (
        *(_constant("embedding.PIECE", tokens) for tokens in (64, 256)),
        *(_constant("embedding.BLOCK_ROWS", rows) for rows in (2, 8)),
        *(_constant("embedding.BLOCK_COLUMNS", columns) for columns in (512, 1024)),
    ),
    "layer_norm": (
        *(_norm_plan("stages", stages) for stages in (2, 3)),
        *(_norm_plan("tile_elements", elements) for elements in (1024, 4096)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Options of `tritium bench tune`."""

    operator: tyro.conf.Positional[str]
    """Operator."""
    shape: tuple[str, ...] = ()
    """Sizes such as 32768x768; default: a few per operator."""
    variant: tuple[str, ...] = ()
    """Names of variants, such as cublas; default: all."""
    device: str = "auto"
    """auto: CUDA. cpu: a rehearsal, in which the references run and all variants are equal."""
    rounds: int = 10
    """Samples per variant."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""


def tune(
    operator: Operator,
    variants: Sequence[Variant],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Check and time every variant at one shape. Return the entry of the JSON."""
    chosen, failed = [Variant.shipped(variants[0].target)], {}
    for variant in variants:
        implementation = Implementation(name=variant.name, call=operator.ours)
        with variant.active():
            why = find_error(operator, implementation, shape, dtype, device)
        if why:
            failed[variant.name] = why
        else:
            chosen.append(variant)

    sets = rotated_inputs(operator, shape, dtype, device)
    times: dict[str, dict[str, Any]] = {variant.name: {} for variant in chosen}
    for direction in directions_of(operator, shape):
        # A variant is active when a graph is made and when it runs backward.
        calls = {
            variant.name: variant.active()(variant.active()(timed)(operator.ours, sets, direction))
            for variant in chosen
        }
        for name, sample in time_in_turn(calls, device, rounds=rounds).items():
            times[name][direction] = sample
    return {
        "shape": list(shape),
        "label": operator.label(shape),
        "seconds": times,
        "failed": failed,
    }


def _print(entry: dict[str, Any], console: Console) -> None:
    directions = list(entry["seconds"][SHIPPED])
    table = Table("variant", *(f"{direction} us" for direction in directions), title=entry["label"])
    fastest_first = sorted(
        entry["seconds"].items(), key=lambda item: item[1][directions[-1]]["median"]
    )
    for name, samples in fastest_first:
        times = (f"{samples[direction]['median'] * 1e6:.1f}" for direction in directions)
        table.add_row(name, *times)
    for name, why in entry["failed"].items():
        table.add_row(name, f"FAILED: {why}")
    console.print(table)


def _chosen(operator: str, names: Sequence[str]) -> list[Variant]:
    """Return the named variants of an operator; all without names."""
    known = {variant.name: variant for variant in VARIANTS[operator]}
    check_names("variant", names, known)
    return [known[name] for name in names or known]


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench tune`. Returns: exit status."""
    about = "Compare the launch sizes of an operator in one run."
    options = parse(TuneOptions, argv, prog="tritium bench tune", description=about)
    name = options.operator
    check_names("operator with variants", [name], VARIANTS)
    check_positive(options, "rounds")
    variants = _chosen(name, options.variant)
    device = choose_device(options.device)
    if device.type != "cuda" and options.device == "auto":
        raise InputError(
            "tritium bench tune: expected a GPU, found none; `tritium bench codegen` needs no GPU"
        )
    choose_matmul(device)
    out = check_writable(options.out)
    console = table_console(140)
    operator, entries = OPERATORS[name], []
    for shape in shapes_of(operator, options.shape, device):
        with side_stream(device):
            entry = tune(operator, variants, shape, torch.bfloat16, device, options.rounds)
        entries.append(entry)
        _print(entry, console)
        if out:
            figures = {"device": device.type, "operator": name, "entries": entries}
            write_record(out, "tune", figures)
    return 0
