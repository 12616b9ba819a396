"""Measure the host's time for a call of each operator: Python, dispatch and allocation.

    tritium bench host --out bench/results/host-cost-cpu.json

Shapes are so small that arithmetic takes almost no time. Four calls take turns, each forward and
backward: the operator in eager mode, the same through PyTorch's dispatcher, which direct calls
skip, and plain PyTorch; and the operator and plain PyTorch compiled. A round takes the fastest of a
few calls, because another process only ever adds time. A figure is the median over rounds.

On a CPU an operator runs its reference, whose own PyTorch calls are part of the figure. The first
row has no such part: an operator that only allocates its result.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..errors import check_positive
from ..kernels.core import op
from ..train.commands.cli import parse
from .ops import OPERATORS, choose
from .ops.case import Operator, outputs_and_leaves
from .record import check_writable, write_record

# No size is larger, so that a call takes microseconds.
MAX_SIZE = 8
CALLS_PER_ROUND = 10
COLUMNS = ("eager", "eager, dispatcher", "eager, PyTorch", "compiled", "compiled, PyTorch")
HELP = f"""Measure the host's time for a call of each operator: Python, dispatch and allocation.


operators: {", ".join(OPERATORS)}; default: all"""


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Options of `tritium bench host`."""

    operators: tyro.conf.Positional[tuple[str, ...]] = ()
    """Operators; default: all."""
    rounds: int = 30
    """Samples per call."""
    compile: bool = True
    """Whether to measure compiled calls too."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""


def empty_like(x: Tensor) -> Tensor:
    """Allocate the result of the operator without arithmetic."""
    return x.new_empty(x.shape)


class _Native(torch.autograd.Function):
    """The operator without arithmetic, in plain PyTorch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return empty_like(ctx.saved_tensors[0])


@functools.cache  # an operator can be registered once
def bare() -> Operator:
    """Return an operator without arithmetic."""
    fwd = op.define_op("bare_fwd", launch=None, reference=empty_like)
    bwd = op.define_op("bare_bwd", launch=None, reference=empty_like)
    fwd.register_autograd(
        lambda ctx, dy: (bwd(ctx.saved_tensors[0]),),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return Operator(
        name="without arithmetic",
        sizes=("M", "N"),
        inputs=lambda randn, M, N: {"x": randn(M, N)},
        ours=op.public(_annotated(fwd)),
        eager=_Native.apply,
        cost=lambda M, N, itemsize: {},
        check_shape=lambda M, N: (M, N),
        shapes=(),
        small_shapes=((8, 8),),
        tiny_shape=(8, 8),
        launch_shapes=(),
        bound="bytes",
    )


def _annotated(fwd: Callable) -> Callable:
    def without_arithmetic(x: Tensor) -> Tensor:
        return fwd(x)

    return without_arithmetic


def forward_backward(call: Callable, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return a function that runs a forward, and a backward if an input needs a gradient."""
    outputs, leaves = outputs_and_leaves(lambda **inputs: call(*inputs.values()), inputs)
    leaves = list(leaves.values())
    incoming = [torch.ones_like(output) for output in outputs]

    def run() -> None:
        outputs = call(*inputs.values())
        if leaves:
            torch.autograd.grad(outputs, leaves, incoming)

    return run


def _through_dispatcher(run: Callable[[], None]) -> float:
    direct, op.device_of = op.device_of, _never_direct
    try:
        return _seconds(run)
    finally:
        op.device_of = direct


def _never_direct(args: Sequence) -> None:
    """Take the place of device_of: every call goes through the dispatcher."""


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def microseconds(clocks: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Time calls in turn. Return the median over rounds of the fastest call of a round."""
    for clock in clocks.values():
        for _ in range(CALLS_PER_ROUND):
            clock()
    found: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            found[name].append(min(clock() for _ in range(CALLS_PER_ROUND)))
    return {name: round(1e6 * float(np.median(times)), 1) for name, times in found.items()}


def measure(operator: Operator, *, rounds: int, compiled: bool) -> dict[str, Any]:
    """Return a row: sizes, and microseconds per forward and backward in each of COLUMNS."""
    torch.manual_seed(0)
    shape = tuple(min(size, MAX_SIZE) for size in operator.small_shapes[0])
    inputs = operator.make_inputs(shape, torch.float32, torch.device("cpu"))
    names = list(inputs)

    def ours(*values):
        return operator.ours(**dict(zip(names, values, strict=True)))

    def native(*values):
        return operator.eager(*values)

    run = forward_backward(ours, inputs)
    clocks = {
        "eager": functools.partial(_seconds, run),
        "eager, dispatcher": functools.partial(_through_dispatcher, run),
        "eager, PyTorch": functools.partial(_seconds, forward_backward(native, inputs)),
    }
    if compiled:
        torch._dynamo.reset()
        # aot_eager has Inductor's wrappers around the same operators, without its compiler.
        compile_ = functools.partial(
            torch.compile, fullgraph=True, dynamic=False, backend="aot_eager"
        )
        clocks["compiled"] = functools.partial(_seconds, forward_backward(compile_(ours), inputs))
        if operator.compiles:
            run = forward_backward(compile_(native), inputs)
            clocks["compiled, PyTorch"] = functools.partial(_seconds, run)
    times = microseconds(clocks, rounds)
    return {"operator": operator.name, "label": operator.label(shape), "microseconds": times}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    result = Table("operator", *COLUMNS, title="microseconds per forward and backward")
    for row in rows:
        times = (str(row["microseconds"].get(name, "-")) for name in COLUMNS)
        result.add_row(row["operator"], *times)
    return result


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench host`. Returns: exit status."""
    options = parse(HostOptions, argv, prog="tritium bench host", description=HELP)
    operators = [bare(), *choose(options.operators)]
    check_positive(options, "rounds")
    out = check_writable(options.out)
    torch.set_num_threads(1)
    rows = [
        measure(operator, rounds=options.rounds, compiled=options.compile) for operator in operators
    ]
    Console(width=120).print(table(rows))
    if out:
        write_record(out, "host", {"device": "cpu", "rows": rows})
    return 0
