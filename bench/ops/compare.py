"""tritium bench kernels: each operator beside what people would use instead, checked first, then timed in turn.

A contestant whose outputs or gradients are further from the float64 truth than twice eager PyTorch's, and than rounding
explains, is refused: it has no time. One that is not installed is named as absent. Shares are of this machine's own ceilings,
measured in the same run, and of the operator's least bytes or FLOPs, from its cost(). "forward" is the forward of training:
with what it saves for the backward, or forms for it already.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...errors import InputError
from ...train.commands.cli import near, parse
from ...train.device import choose_device, choose_matmul
from ..record import write_record
from ..timing import Ceilings, ceilings, input_sets, time_in_turn
from . import OPERATORS
from .case import Contestant, Operator
from .plot import plot_contest

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Which parts of an operator's cost each direction has.
DIRECTIONS = {"forward": ("fwd",), "backward": ("bwd",), "both": ("fwd", "bwd")}
FACTOR = 2.0
HELP = f"""Measure operators beside eager PyTorch, torch.compile, PyTorch's own fused operators and what else is installed.


operators: {", ".join(OPERATORS)}; default: all"""


@dataclass(frozen=True, kw_only=True)
class ContestOptions:
    """Options of `tritium bench kernels`."""

    operators: tyro.conf.Positional[tuple[str, ...]] = ()
    """Operators; default: all."""
    shape: tuple[str, ...] = ()
    """Sizes like 32768x768, in the order the table names them; default: the operator's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda ...; auto: CUDA if there is one."""
    rounds: int = 20
    """Samples of each contestant."""
    out: str | None = None
    """Folder for kernels.json and a plot of each operator."""


def refusal(
    operator: Operator,
    contestant: Contestant,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Why a contestant may not be timed: its error, or what it raised; None if it is right."""
    torch.manual_seed(0)
    inputs = operator.inputs(operator.check_shape(shape), dtype, device)
    double = {name: _in_float64(value) for name, value in inputs.items()}
    truth, upstream = _values(operator.eager, double, None)
    peer, _ = _values(operator.eager, inputs, upstream)
    try:
        got, _ = _values(contestant.call, inputs, upstream)
    except Exception as error:  # other people's code may raise anything
        return f"{type(error).__name__}: {error}".split("\n")[0]
    rounding = _rounding(inputs, dtype)
    for name, expected in truth.items():
        if got[name].shape != expected.shape:
            return f"{name} is {tuple(got[name].shape)}, expected {tuple(expected.shape)}"
        # The largest error finds one wrong element, the root of the mean square a small factor on all of them: rounding to
        # nearest is off by at most eps / 2, and in the mean square by a third of that root.
        for measure, norm, share in (("at most", _largest, 1.0), ("in the mean square", _rms, 0.3)):
            error, theirs = (norm(value[name].double() - expected) for value in (got, peer))
            if not error <= max(FACTOR * theirs, share * rounding * norm(expected)):
                return f"{name} is off by {error:.2g} {measure}, eager PyTorch by {theirs:.2g}"
    return None


def _rounding(inputs: dict[str, Any], dtype: torch.dtype) -> float:
    """What two roundings to the dtype and a float32 sum along the longest axis may be off by at most, relative."""
    longest = max(
        size for value in inputs.values() if isinstance(value, Tensor) for size in value.shape
    )
    return torch.finfo(dtype).eps + (8 + longest**0.5) * torch.finfo(torch.float32).eps


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _in_float64(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _values(
    call: Callable, inputs: dict[str, Any], upstream: list[Tensor] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name, and the incoming gradients, drawn if not given."""
    outputs = call(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        upstream = [torch.randn_like(output) for output in outputs]
    leaves = {name: value for name, value in inputs.items() if _differentiable(value)}
    incoming = [
        gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=True)
    ]
    grads = torch.autograd.grad(outputs, list(leaves.values()), incoming) if leaves else ()
    named = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}, upstream


def measure(
    operator: Operator,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    limits: Ceilings,
    rounds: int,
) -> dict[str, Any]:
    """Check and time every contestant at one shape; the entry of the JSON."""
    absent, refused, calls = {}, {}, {}
    for contestant in operator.contestants():
        if why := contestant.absence(device):
            absent[contestant.name] = why
        elif why := refusal(operator, contestant, shape, dtype, device):
            refused[contestant.name] = why
        else:
            calls[contestant.name] = contestant.call
    sets = rotated_inputs(operator, shape, dtype, device)
    cost = operator.cost(shape, dtype.itemsize)
    directions = directions_of(operator, shape)
    for name, call in list(calls.items()):
        if why := _failure(call, sets[0], directions):
            refused[name] = why
            del calls[name]
    rows = []
    for direction, parts in directions.items():
        samples = time_in_turn(
            {name: timed(call, sets, direction) for name, call in calls.items()},
            device,
            rounds=rounds,
        )
        work = sum(cost[f"{part}_{operator.bound}"] for part in parts)
        limit = limits.bytes_per_second if operator.bound == "bytes" else limits.flops_per_second
        for name, sample in samples.items():
            rate = work / sample.median
            row = {
                "contestant": name,
                "direction": direction,
                "seconds": asdict(sample),
                "rate": rate,
                "share": rate / limit,
            }
            rows.append(
                row
                | {
                    "peak_bytes": _peak(calls[name], sets[0], device)
                    if direction == "both"
                    else None
                }
            )
    return {
        "operator": operator.name, "shape": list(shape), "label": operator.label(shape), "bound": operator.bound,
        "rows": rows, "absent": absent, "refused": refused,
    }  # fmt: skip


def directions_of(operator: Operator, shape: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Those of DIRECTIONS that an operator has: what is for inference alone costs nothing backward."""
    cost = operator.cost(shape, 1)
    return {
        name: parts
        for name, parts in DIRECTIONS.items()
        if all(f"{part}_{operator.bound}" in cost for part in parts)
    }


def rotated_inputs(
    operator: Operator, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Sets of inputs, so many that none is still in a GPU's cache when its turn comes again."""
    first = operator.inputs(shape, dtype, device)
    size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    return [
        first,
        *(operator.inputs(shape, dtype, device) for _ in range(input_sets(size, device) - 1)),
    ]


def _failure(call: Callable, inputs: dict[str, Any], directions: Iterable[str]) -> str | None:
    """What a contestant raises at the full shape, in any direction; the others' turn comes all the same."""
    for direction in directions:
        try:
            run = timed(call, [inputs], direction)
            run(0)
            run(1)
        except Exception as error:  # other people's code may raise anything, and memory may run out
            return f"{direction} failed: {type(error).__name__}: {error}".split("\n")[0]
    return None


def timed(call: Callable, sets: list[dict[str, Any]], direction: str) -> Callable[[int], object]:
    """A call of one direction, given the number of the input set to use; the backward keeps each set's forward graph."""

    def graph(number: int) -> tuple:
        inputs = sets[number % len(sets)]
        outputs = call(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [value for value in inputs.values() if _differentiable(value)]
        return outputs, leaves, [torch.ones_like(output) for output in outputs]

    if direction == "forward":
        return lambda number: call(**sets[number % len(sets)])
    if direction == "both":
        return lambda number: torch.autograd.grad(*graph(number))
    graphs = [graph(number) for number in range(len(sets))]
    return lambda number: torch.autograd.grad(*graphs[number % len(sets)], retain_graph=True)


def _peak(call: Callable, inputs: dict[str, Any], device: torch.device) -> int | None:
    """Bytes that forward and backward need at once beyond the inputs; None where nobody counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed(call, [inputs], "both")(0)
    return torch.cuda.max_memory_allocated() - before


def _print(entry: dict[str, Any], console: Console) -> None:
    unit, scale = ("GB/s", 1e9) if entry["bound"] == "bytes" else ("TFLOP/s", 1e12)
    directions = list(dict.fromkeys(row["direction"] for row in entry["rows"]))
    table = Table(
        "contestant", *(f"{d} us" for d in directions), unit, "of ceiling", "spread", "peak MB"
    )
    table.title = f"{entry['operator']}  {entry['label']}"
    by_name: dict[str, dict[str, dict]] = {}
    for row in entry["rows"]:
        by_name.setdefault(row["contestant"], {})[row["direction"]] = row
    for name, rows in by_name.items():
        whole = rows[directions[-1]]  # forward and backward where there are both
        spread = (whole["seconds"]["p90"] - whole["seconds"]["p10"]) / whole["seconds"]["median"]
        peak = "-" if whole["peak_bytes"] is None else f"{whole['peak_bytes'] / 1e6:.0f}"
        times = (f"{rows[direction]['seconds']['median'] * 1e6:.1f}" for direction in directions)
        table.add_row(
            name,
            *times,
            f"{whole['rate'] / scale:.3g}",
            f"{whole['share']:.0%}",
            f"{spread:.0%}",
            peak,
        )
    for name, why in entry["refused"].items():
        table.add_row(name, f"REFUSED: {why}")
    for name, why in entry["absent"].items():
        table.add_row(name, f"absent: {why}")
    console.print(table)


def shapes_of(
    operator: Operator, words: Sequence[str], device: torch.device
) -> list[tuple[int, ...]]:
    """Shapes as typed, or the operator's own for the device. Raises: InputError if they are not of its kind."""
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


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench kernels`. Returns: exit status."""
    options = parse(ContestOptions, argv, prog="tritium bench kernels", description=HELP)
    for name in options.operators:
        if name not in OPERATORS:
            raise InputError(
                f"tritium bench kernels: no operator {name!r}; near: {near(name, list(OPERATORS))}"
            )
    if options.rounds < 1:
        raise InputError(f"--rounds: expected 1 or more, got {options.rounds}")
    device = choose_device(options.device)
    choose_matmul(device)
    dtype = DTYPES.get(options.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    operators = [OPERATORS[name] for name in options.operators or OPERATORS]
    work = [
        (operator, shape)
        for operator in operators
        for shape in shapes_of(operator, options.shape, device)
    ]
    console = Console(width=None if Console().is_terminal else 160)
    if device.type != "cuda":
        print(
            "No GPU: these are the references on small shapes. No Triton kernel runs, memory is not counted, and how the"
        )
        print("contestants compare here says nothing about how they compare on a GPU.")
    limits = ceilings(device, dtype)
    print(f"ceilings, measured now: copy {limits.bytes_per_second / 1e9:,.0f} GB/s, product "
          f"{limits.flops_per_second / 1e12:,.2f} TFLOP/s; {dtype}")  # fmt: skip
    run = {"device": device.type, "dtype": str(dtype), "ceilings": asdict(limits)}
    out, entries = None if options.out is None else Path(options.out), []
    if out:
        out.mkdir(parents=True, exist_ok=True)
    for operator, shape in work:
        try:
            entries.append(measure(operator, shape, dtype, device, limits, options.rounds))
        except torch.OutOfMemoryError:  # what each could hold alone, all together cannot
            print(
                f"{operator.name}  {operator.label(shape)}: out of memory with every contestant's inputs and graphs; left out"
            )
            continue
        _print(entries[-1], console)
        if out:  # after each: what was measured stays, whatever stops the rest
            write_record(out / "kernels.json", "kernels", {**run, "entries": entries})
    if out:
        for operator in operators:
            if measured := [entry for entry in entries if entry["operator"] == operator.name]:
                plot_contest(measured, asdict(limits), out)
        print(f"written: {out / 'kernels.json'} and a plot of each operator")
    return 0
