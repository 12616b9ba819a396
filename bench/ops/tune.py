"""tritium bench tune: launch sizes of one operator against one another, each checked before it is timed.

A variant is what a launcher would find in place of one of its own constants or plans. Each replaces it while its turn lasts,
forward and backward, so that all of them and the shipped one ("as shipped") are timed in one run, in turn. One that does not
compile, does not fit or is wrong is refused and named. The fastest become rows in kernels/, with device and date beside them.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ...errors import InputError
from ...kernels.attention import launch as attention_launch
from ...kernels.mlp import _gemm
from ...train.commands.cli import near, parse
from ...train.device import choose_device, choose_matmul
from ..record import writable, write_record
from ..timing import time_in_turn
from . import OPERATORS
from .case import Contestant, Operator
from .compare import directions_of, refusal, rotated_inputs, shapes_of, timed


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A replacement: `target` names a module of kernels and what in it, `value` takes its place."""

    name: str
    target: str
    value: Any

    @classmethod
    def shipped(cls, target: str) -> "Variant":
        """What is there already, put in its place as all others are: to do so takes time too."""
        return cls(name="as shipped", target=target, value=getattr(*_place(target)))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Have launchers use it."""
        module, name = _place(self.target)
        before = getattr(module, name)
        setattr(module, name, self.value)
        try:
            yield
        finally:
            setattr(module, name, before)

    def during(self, call: Callable) -> Callable:
        """`call` with launchers using it."""

        def run(*args, **kwargs):
            with self.active():
                return call(*args, **kwargs)

        return run


@functools.cache
def _place(target: str) -> tuple[ModuleType, str]:
    module, name = target.rsplit(".", 1)
    return importlib.import_module(f"...kernels.{module}", __package__), name


def _product(*sizes: int) -> Variant:
    tile = _gemm._tile(*sizes)
    return Variant(
        name=f"tile {sizes}", target="mlp._gemm.plan", value=lambda *_, **__: (tile, True)
    )


def _attention(direction: str, *sizes: int) -> Variant:
    shipped, names = attention_launch.plan, ("block_m", "block_n", "num_warps", "num_stages")
    tile = attention_launch.Tile(**dict(zip(names, sizes, strict=True)))
    return Variant(
        name=f"{direction} {sizes}",
        target="attention.launch.plan",
        value=lambda wanted, *rest: tile if wanted == direction else shipped(wanted, *rest),
    )


def _constant(target: str, value: Any) -> Variant:
    return Variant(name=f"{target.rsplit('.', 1)[1]} {value}", target=target, value=value)


# What the machine code ranked close together (estimates), and what only a clock can tell.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "gelu_mlp": (
        Variant(name="cublas", target="mlp._gemm.plan", value=lambda *_, **__: (None, False)),
        _product(128, 256, 64, 4, 8, 3),
        _product(128, 256, 64, 2, 8, 3),
        _product(128, 256, 64, 4, 8, 2),
        _product(128, 128, 64, 1, 4, 3),
        _product(128, 128, 64, 2, 4, 3),
        _product(128, 128, 64, 1, 8, 4),
        _product(256, 128, 64, 2, 8, 3),
        _product(128, 256, 32, 4, 8, 4),
        *(_constant("mlp._gemm.GROUP_M", rows) for rows in (4, 16)),
    ),
    "causal_attention": (
        _attention("fwd", 128, 64, 4, 3),
        _attention("fwd", 128, 128, 8, 2),
        _attention("fwd", 128, 64, 8, 3),
        _attention("fwd", 64, 128, 4, 2),
        _attention("dq", 128, 128, 8, 2),
        _attention("dq", 64, 128, 4, 2),
        _attention("dq", 128, 64, 4, 3),
        _attention("dkdv", 64, 64, 4, 2),
        _attention("dkdv", 128, 128, 8, 2),
        _attention("dkdv", 64, 128, 4, 2),
        *(_constant("attention.launch.L2_BYTES", megabytes << 20) for megabytes in (8, 32)),
    ),
    "cross_entropy": tuple(
        _constant("loss._launch.UNROLL", {"sm_": loads, "gfx": 2}) for loads in (1, 2)
    ),
    "linear_cross_entropy": tuple(
        _constant("loss.linear_cross_entropy.CHUNK_ROWS", rows) for rows in (2048, 8192, 16384)
    ),
    "layer_norm": tuple(
        _constant("norm._launch.TILE_ELEMENTS", elements) for elements in (1024, 4096)
    ),
}


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Options of `tritium bench tune`."""

    operator: tyro.conf.Positional[str]
    """Operator."""
    shape: tuple[str, ...] = ()
    """Sizes like 32768x768; default: the operator's own."""
    rounds: int = 10
    """Samples of each variant."""
    out: str | None = None
    """Also write the figures as JSON."""


def tune(
    operator: Operator,
    variants: Sequence[Variant],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Check and time every variant at one shape; the entry of the JSON."""
    shipped = Variant.shipped(variants[0].target)
    sets, refused, chosen = (
        rotated_inputs(operator, shape, dtype, device),
        {},
        {shipped.name: shipped.during},
    )
    for variant in variants:
        call = variant.during(operator.ours)
        with variant.active():
            why = refusal(operator, Contestant(name=variant.name, call=call), shape, dtype, device)
        if why:
            refused[variant.name] = why
        else:
            chosen[variant.name] = variant.during
    times: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for direction in directions_of(operator, shape):
        # A backward's graph is made by the variant whose turn it is.
        calls = {
            name: during(during(timed)(operator.ours, sets, direction))
            for name, during in chosen.items()
        }
        for name, sample in time_in_turn(calls, device, rounds=rounds).items():
            times[name][direction] = asdict(sample)
    return {
        "shape": list(shape),
        "label": operator.label(shape),
        "seconds": times,
        "refused": refused,
    }


def _print(entry: dict[str, Any], console: Console) -> None:
    directions = list(entry["seconds"]["as shipped"])
    table = Table("variant", *(f"{direction} us" for direction in directions), title=entry["label"])
    for name, samples in sorted(
        entry["seconds"].items(), key=lambda item: item[1][directions[-1]]["median"]
    ):
        table.add_row(
            name, *(f"{samples[direction]['median'] * 1e6:.1f}" for direction in directions)
        )
    for name, why in entry["refused"].items():
        table.add_row(name, f"REFUSED: {why}")
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench tune`. Returns: exit status."""
    options = parse(
        TuneOptions,
        argv,
        prog="tritium bench tune",
        description="Time an operator's launch sizes in one run.",
    )
    name = options.operator
    if name not in VARIANTS:
        raise InputError(
            f"tritium bench tune: no operator with variants {name!r}; near: {near(name, list(VARIANTS))}"
        )
    if options.rounds < 1:
        raise InputError(f"--rounds: expected 1 or more, got {options.rounds}")
    device = choose_device("auto")
    if device.type != "cuda":
        raise InputError(
            "tritium bench tune: expected a GPU, found none; `tritium bench codegen` needs none"
        )
    choose_matmul(device)
    operator, out = OPERATORS[name], None if options.out is None else writable(Path(options.out))
    console, entries = Console(width=None if Console().is_terminal else 140), []
    for shape in shapes_of(operator, options.shape, device):
        entries.append(
            tune(operator, VARIANTS[name], shape, torch.bfloat16, device, options.rounds)
        )
        _print(entries[-1], console)
        if out:
            write_record(out, "tune", {"operator": name, "entries": entries})
    return 0
