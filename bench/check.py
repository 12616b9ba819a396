"""tritium check: is this installation right, and is it as fast as it should be?

Each operator, forward and backward, is compared with float64, as `tritium bench kernels` does
before it times an operator.

    with a GPU       the kernels in float32 and bfloat16, then their speed as a fraction of the
                     ceiling of the machine, measured in the same run
    without a GPU    the PyTorch references, and the kernels in Triton's interpreter, on tiny shapes

The interpreter needs another process, because Triton reads TRITON_INTERPRET at import.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..kernels.core.op import INTERPRET
from ..kernels.core.triton import HAS_TRITON
from ..train.commands.cli import parse
from ..train.machine.device import choose_device, choose_matmul
from ..train.terminal.progress import table_console
from .ops import OPERATORS, choose
from .ops.case import Implementation, Operator
from .ops.check import find_error
from .ops.compare import directions_of, rotated_inputs, timed
from .record import check_writable, describe_provenance, provenance, write_record
from .timing import ceilings, side_stream, time_in_turn

_DESCRIPTION = "Check every operator of this installation against float64, forward and backward."
_ROUNDS = 5
# The process that runs the interpreter prints one JSON object per line after this word.
_RESULT = "RESULT "


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `tritium check`."""

    operators: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="[OPERATOR ...]")]
    ] = ()
    """Operators; default: all."""
    device: str = "auto"
    """cpu, cuda ...; auto: CUDA if there is a GPU."""
    json: str | None = None
    """Write the results to this file, for a bug report."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium check`. Returns: exit status, 1 if an operator is wrong."""
    options = parse(CheckOptions, argv, prog="tritium check", description=_DESCRIPTION)
    operators = choose(options.operators)
    out = check_writable(options.json)
    device = choose_device(options.device)
    choose_matmul(device)
    print(describe_provenance({**provenance(), "device": device.type}))

    on_gpu = device.type == "cuda"
    checks = (_check_kernels if on_gpu else _check_without_gpu)(operators, device)
    total = len(operators) * (2 if on_gpu or (HAS_TRITON and not INTERPRET) else 1)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=total)
        for result in checks:
            results.append(result)
            bar.advance(task)

    figures: dict[str, Any] = {"device": device.type, "checks": results}
    if on_gpu:
        limits = ceilings(device, torch.bfloat16)
        figures |= {"ceilings": limits, "speed": _speeds(operators, device, limits)}
    _print_table(results, figures.get("speed", {}))
    wrong = [result for result in results if result["error"]]
    if out:
        write_record(out, "check", figures)
        print(f"written: {out}")
    if not wrong:
        print(f"{len(results)} checks passed")
        return 0
    hint = "" if out else "; for a bug report, add --json FILE"
    print(f"{len(wrong)} of {len(results)} checks failed{hint}", file=sys.stderr)
    return 1


# --- correctness


def _check(
    operator: Operator, shape: Sequence[int], dtype: torch.dtype, device: torch.device, what: str
) -> dict[str, Any]:
    """Compare an operator with float64. `error` is one line, or None."""
    ours = Implementation(name="tritium", call=operator.ours)
    return {
        "operator": operator.name,
        "shape": list(operator.check_shape(*shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "runs": what,
        "error": find_error(operator, ours, shape, dtype, device),
    }


def _check_kernels(operators: Sequence[Operator], device: torch.device) -> Iterator[dict[str, Any]]:
    what = "kernels" if HAS_TRITON else "references"
    for operator in operators:
        for dtype in (torch.float32, torch.bfloat16):
            yield _check(operator, operator.small_shapes[0], dtype, device, what)


def _check_tiny(
    operators: Sequence[Operator], device: torch.device, what: str
) -> Iterator[dict[str, Any]]:
    for operator in operators:
        yield _check(operator, operator.tiny_shape, torch.float32, device, what)


def _check_without_gpu(
    operators: Sequence[Operator], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Check the references, and meanwhile the kernels in another process."""
    if INTERPRET or not HAS_TRITON:  # this process has only one of them
        yield from _check_tiny(operators, device, "interpreter" if INTERPRET else "references")
        return
    with ThreadPoolExecutor(1) as background:
        interpreted = background.submit(_run_interpreter, operators)
        yield from _check_tiny(operators, device, "references")
        yield from interpreted.result()


def _run_interpreter(operators: Sequence[Operator]) -> list[dict[str, Any]]:
    """Check the kernels in a process with Triton's interpreter."""
    package = __package__.split(".")[0]
    code = f"from {package}.bench import check; check.print_interpreted()"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *(operator.name for operator in operators)],
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    results = [json.loads(line.removeprefix(_RESULT)) for line in lines]
    for operator in operators[len(results) :]:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        error = f"the interpreter ended with status {done.returncode}: {last}"
        results.append(
            {"operator": operator.name, "shape": [], "dtype": "float32", "runs": "interpreter"}
            | {"error": error}
        )
    return results


def print_interpreted() -> None:
    """Check the kernels that sys.argv names, in Triton's interpreter, and print the results."""
    operators = [OPERATORS[name] for name in sys.argv[1:]]
    for result in _check_tiny(operators, torch.device("cpu"), "interpreter"):
        print(_RESULT + json.dumps(result), flush=True)


# --- speed


def _speeds(
    operators: Sequence[Operator], device: torch.device, limits: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Time forward and backward of each operator in bfloat16, at its first shape."""
    speeds = {}
    for operator in operators:
        shape = operator.shapes[0]
        direction, parts = list(directions_of(operator, shape).items())[-1]
        with side_stream(device):
            sets = rotated_inputs(operator, shape, torch.bfloat16, device)
            turns = {"tritium": timed(operator.ours, sets, direction)}
            sample = time_in_turn(turns, device, rounds=_ROUNDS)["tritium"]
        cost = operator.cost(*shape, 2)
        work = sum(cost[f"{part}_{operator.bound}"] for part in parts)
        speeds[operator.name] = {
            "shape": list(shape),
            "direction": direction,
            "seconds": sample,
            "share": work / sample["median"] / limits[f"{operator.bound}_per_second"],
        }
    return speeds


def _print_table(results: list[dict[str, Any]], speeds: dict[str, dict[str, Any]]) -> None:
    columns = list(dict.fromkeys((each["runs"], each["dtype"]) for each in results))
    found = {(each["operator"], each["runs"], each["dtype"]): each["error"] for each in results}
    table = Table("operator", *(f"{runs}, {dtype}" for runs, dtype in columns))
    if speeds:
        table.add_column("of ceiling, bfloat16")
    for name in dict.fromkeys(each["operator"] for each in results):
        errors = [found[(name, *column)] for column in columns]
        row = [f"WRONG: {error}" if error else "ok" for error in errors]
        if speeds:
            row.append(f"{speeds[name]['share']:.0%}")
        table.add_row(name, *row)
    table_console(140).print(table)
