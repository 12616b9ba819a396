"""tritium bench kernels: compare each operator with the implementations people would use instead.

Each implementation is checked against float64 first (check.py). A wrong one is not timed. A library
that is not installed is listed as missing.

All implementations are timed in turn, in the same run. On a GPU the column "timed by" says whether
a CUDA graph was replayed (timing.py). Throughput counts the least bytes or FLOPs the operator
needs, from its cost(). It is also given as a percentage of the ceiling of this machine, measured in
the same run. "forward" is the forward of training: it includes what the operator saves or computes
for the backward.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...errors import InputError, check_positive
from ...train.commands.cli import parse
from ...train.machine.device import choose_device, choose_matmul
from ...train.storage.records import check_names
from ...train.terminal.progress import table_console
from ..record import write_record
from ..timing import ceilings, input_sets, side_stream, time_in_turn
from . import OPERATORS, choose
from .case import Operator, outputs_and_leaves
from .check import find_error
from .plot import plot_operator

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Direction -> the parts of an operator's cost() that it adds up.
DIRECTIONS = {"forward": ("fwd",), "backward": ("bwd",), "both": ("fwd", "bwd")}
HELP = f"""Compare operators with eager PyTorch, torch.compile, SDPA and installed libraries.


operators: {", ".join(OPERATORS)}; default: all"""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of `tritium bench kernels`."""

    operators: tyro.conf.Positional[tuple[str, ...]] = ()
    """Operators; default: all."""
    shape: tuple[str, ...] = ()
    """Sizes such as 32768x768, in the order the table names them; default: a few per operator."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda ...; auto: CUDA if there is a GPU."""
    rounds: int = 20
    """Samples per implementation."""
    without: tuple[str, ...] = ()
    """Implementations to leave out, such as torch.compile, which compiles for minutes."""
    out: str | None = None
    """Folder for kernels.json and a plot per operator."""


# --- measuring


def measure(
    operator: Operator,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    limits: dict[str, float],
    rounds: int,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Check and time every implementation at one shape. Return the entry of the JSON."""
    # Check all implementations.
    missing, failed, calls = {}, {}, {}
    for implementation in operator.implementations():
        if implementation.name in without:
            continue
        if why := implementation.why_missing(device):
            missing[implementation.name] = why
        elif why := find_error(operator, implementation, shape, dtype, device):
            failed[implementation.name] = why
        else:
            calls[implementation.name] = implementation.call

    # Leave out those that fail at the full shape.
    sets = rotated_inputs(operator, shape, dtype, device)
    directions = directions_of(operator, shape)
    for name, call in list(calls.items()):
        if why := _failure(call, sets[0], directions):
            failed[name] = why
            del calls[name]

    # Time the others.
    rows = []
    cost = operator.cost(*shape, dtype.itemsize)
    limit = limits[f"{operator.bound}_per_second"]
    for direction, parts in directions.items():
        turns = {name: timed(call, sets, direction) for name, call in calls.items()}
        work = sum(cost[f"{part}_{operator.bound}"] for part in parts)
        for name, sample in time_in_turn(turns, device, rounds=rounds).items():
            rate = work / sample["median"]
            peak = _peak_bytes(calls[name], sets[0], device) if direction == "both" else None
            rows.append(
                {
                    "implementation": name,
                    "direction": direction,
                    "seconds": sample,
                    "rate": rate,
                    "share": rate / limit,
                    "peak_bytes": peak,
                }
            )
    return {
        "operator": operator.name,
        "shape": list(shape),
        "label": operator.label(shape),
        "bound": operator.bound,
        "rows": rows,
        "missing": missing,
        "failed": failed,
    }


def directions_of(operator: Operator, shape: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Return the DIRECTIONS of an operator. Operators for inference have no backward."""
    cost = operator.cost(*shape, 1)
    return {
        name: parts
        for name, parts in DIRECTIONS.items()
        if all(f"{part}_{operator.bound}" in cost for part in parts)
    }


def rotated_inputs(
    operator: Operator, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Return several sets of inputs, together larger than the cache of a GPU."""
    first = operator.make_inputs(shape, dtype, device)
    nbytes = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    more = input_sets(nbytes, device) - 1
    return [first, *(operator.make_inputs(shape, dtype, device) for _ in range(more))]


def timed(call: Callable, sets: list[dict[str, Any]], direction: str) -> Callable[[int], object]:
    """Return a function that runs one direction on the set of inputs with the given number.

    The gradients of the outputs are random numbers that were drawn before. The backward keeps the
    graph of each set's forward.
    """

    def graph(number: int) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        outputs, leaves = outputs_and_leaves(call, sets[number % len(sets)])
        return outputs, list(leaves.values())

    if direction == "forward":
        return lambda number: call(**sets[number % len(sets)])
    graphs = [graph(number) for number in range(len(sets))]
    # A loss has the gradient 1, as in training: some libraries skip their multiplication then.
    gradients = [
        [torch.randn_like(out) if out.ndim else torch.ones_like(out) for out in outputs]
        for outputs, _ in graphs
    ]
    if direction == "both":
        graphs.clear()
        return lambda number: torch.autograd.grad(*graph(number), gradients[number % len(sets)])
    return lambda number: torch.autograd.grad(
        *graphs[number % len(sets)], gradients[number % len(sets)], retain_graph=True
    )


def _failure(call: Callable, inputs: dict[str, Any], directions: Iterable[str]) -> str | None:
    """Return what an implementation raises at the full shape, or None."""
    for direction in directions:
        try:
            run = timed(call, [inputs], direction)
            run(0)
            run(1)
        except Exception as error:  # other libraries may raise anything, or memory runs out
            return f"{direction} failed: {type(error).__name__}: {error}".split("\n")[0]
    return None


def _peak_bytes(call: Callable, inputs: dict[str, Any], device: torch.device) -> int | None:
    """Return the peak bytes of forward and backward besides their inputs; None on a CPU."""
    if device.type != "cuda":
        return None
    run = timed(call, [inputs], "both")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(0)
    return torch.cuda.max_memory_allocated() - before


# --- the command


def shapes_of(
    operator: Operator, words: Sequence[str], device: torch.device
) -> list[tuple[int, ...]]:
    """Return the shapes given as words, or the operator's own for the device.

    Raises: InputError if a word is not a shape of the operator.
    """
    if not words:
        return list(operator.shapes if device.type == "cuda" else operator.small_shapes)
    shapes = []
    for word in words:
        sizes = word.lower().split("x")
        if len(sizes) != len(operator.sizes) or not all(
            size.isdecimal() and int(size) > 0 for size in sizes
        ):
            raise InputError(
                f"--shape: expected {'x'.join(operator.sizes)} for {operator.name}, such as "
                f"{'x'.join(map(str, operator.small_shapes[0]))}, got {word!r}"
            )
        shapes.append(tuple(map(int, sizes)))
    return shapes


def _implementation_names() -> dict[str, None]:
    """Return the names of the implementations of all operators, each once."""
    rows = (row for operator in OPERATORS.values() for row in operator.implementations())
    return dict.fromkeys(row.name for row in rows)


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench kernels`. Returns: exit status."""
    # Check the options.
    options = parse(CompareOptions, argv, prog="tritium bench kernels", description=HELP)
    operators = choose(options.operators)
    check_names("implementation", options.without, _implementation_names())
    check_positive(options, "rounds")
    device = choose_device(options.device)
    choose_matmul(device)
    dtype = DTYPES.get(options.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    shapes = {operator.name: shapes_of(operator, options.shape, device) for operator in operators}
    out = None if options.out is None else Path(options.out)
    if out:
        out.mkdir(parents=True, exist_ok=True)

    # Measure the machine.
    if device.type != "cuda":
        print("No GPU: these are the PyTorch references on small shapes. No Triton kernel runs,")
        print("memory is not measured, and the ratios say nothing about a GPU.")
    limits = ceilings(device, dtype)
    print(
        f"ceilings, measured now: copy {limits['bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"matmul {limits['flops_per_second'] / 1e12:,.2f} TFLOP/s; {dtype}"
    )

    # Measure the operators. Write after each one: an interruption loses nothing.
    console = table_console(160)
    run = {"device": device.type, "dtype": str(dtype), "ceilings": limits}
    entries: list[dict[str, Any]] = []
    for operator, shape in ((one, shape) for one in operators for shape in shapes[one.name]):
        try:
            with side_stream(device):
                entry = measure(
                    operator, shape, dtype, device, limits, options.rounds, options.without
                )
        except torch.OutOfMemoryError:
            label = f"{operator.name}  {operator.label(shape)}"
            print(f"{label}: out of memory with the inputs and graphs of all implementations")
            continue
        entries.append(entry)
        _print(entry, console)
        if out:
            write_record(out / "kernels.json", "kernels", {**run, "entries": entries})
    if out:
        for name in dict.fromkeys(entry["operator"] for entry in entries):
            measured = [entry for entry in entries if entry["operator"] == name]
            plot_operator(measured, limits, out)
        print(f"written: {out / 'kernels.json'} and a plot per operator")
    return 0


def _print(entry: dict[str, Any], console: Console) -> None:
    unit, scale = ("GB/s", 1e9) if entry["bound"] == "bytes" else ("TFLOP/s", 1e12)
    directions = list(dict.fromkeys(row["direction"] for row in entry["rows"]))
    columns = [*(f"{direction} us" for direction in directions), unit, "of ceiling", "spread"]
    table = Table("implementation", *columns, "peak MB", "timed by")
    table.title = f"{entry['operator']}  {entry['label']}"
    by_name: dict[str, dict[str, dict]] = {}
    for row in entry["rows"]:
        by_name.setdefault(row["implementation"], {})[row["direction"]] = row
    for name, rows in by_name.items():
        last = rows[directions[-1]]  # "both", or "forward" for inference
        seconds = last["seconds"]
        table.add_row(
            name,
            *(f"{rows[direction]['seconds']['median'] * 1e6:.1f}" for direction in directions),
            f"{last['rate'] / scale:.3g}",
            f"{last['share']:.0%}",
            f"{(seconds['p90'] - seconds['p10']) / seconds['median']:.0%}",
            "-" if last["peak_bytes"] is None else f"{last['peak_bytes'] / 1e6:.0f}",
            " / ".join(dict.fromkeys(row["seconds"]["timed_by"] for row in rows.values())),
        )
    for name, why in entry["failed"].items():
        table.add_row(name, f"FAILED: {why}")
    for name, why in entry["missing"].items():
        table.add_row(name, f"missing: {why}")
    console.print(table)
