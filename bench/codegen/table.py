"""tritium bench codegen: what every kernel becomes at its shipped configurations, for GPUs that need not be there.

A row is one launch of an operator at one shape for one GPU: registers, spilled bytes, shared memory, how many blocks fit and
what limits them, matrix instructions, bulk loads, seconds to compile; for sm_80, sm_90 and sm_100 also of its hottest loop the
bytes that a pass of a block moves, how many a lane takes at once, and estimated bounds.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from rich.console import Console
from rich.table import Table

from ...errors import InputError
from ...train.commands.cli import near, parse
from ..ops import OPERATORS
from ..ops.case import Operator
from ..record import provenance, read_record, writable, write_record
from . import disassembly, machine_code
from .launches import TARGETS, Launch, compile_launch, record_launches

# What the trainer runs the kernels in.
DTYPE = torch.bfloat16
KEYS = ("operator", "shape", "kernel", "arch")
HELP = f"""Compile every kernel at its shipped configurations and read its machine code. No GPU is needed.


operators: {", ".join(name for name, operator in OPERATORS.items() if operator.launches)}; default: all"""


@dataclass(frozen=True, kw_only=True)
class CodegenOptions:
    """Options of `tritium bench codegen`."""

    operators: tyro.conf.Positional[tuple[str, ...]] = ()
    """Operators; default: all that have kernels."""
    arch: tuple[str, ...] = tuple(TARGETS)
    """sm_80, sm_90, sm_100, sm_120, gfx942, gfx950."""
    out: str | None = None
    """Also write the rows as JSON."""
    compare: str | None = None
    """JSON of an earlier run: print what changed since."""


def rows_of(operators: Sequence[Operator], archs: Sequence[str]) -> list[dict[str, Any]]:
    """Compile the operators' launches for each architecture; one row each, as in the JSON."""
    found = list(_compiled(operators, archs))
    texts = disassembly.disassemblies([compiled for _, compiled, _ in found])
    return [
        {**keys, **describe(compiled, text, keys["arch"]), "compile_seconds": round(seconds, 3)}
        for (keys, compiled, seconds), text in zip(found, texts, strict=True)
    ]


def _compiled(
    operators: Sequence[Operator], archs: Sequence[str]
) -> Iterator[tuple[dict, Any, float]]:
    for operator in operators:
        for shape in operator.launch_shapes:
            for arch in archs:
                with record_launches(arch) as launches:
                    operator.launches(shape, DTYPE)
                # A kernel that is launched again for another part of the same work has one row.
                for kernel, launch in {
                    _name(launch): launch for launch in reversed(launches)
                }.items():
                    began = time.perf_counter()
                    compiled = compile_launch(launch, arch)
                    values = (operator.name, operator.label(shape), kernel, arch)
                    yield (
                        dict(zip(KEYS, values, strict=True)),
                        compiled,
                        time.perf_counter() - began,
                    )


def _name(launch: Launch) -> str:
    """A kernel's name, with the epilogue that it was given, where it has one."""
    epilogue = launch.arguments.get("EPILOGUE")
    return launch.kernel.__name__ + (f" with {epilogue.__name__}" if epilogue else "")


def describe(compiled, text: str, arch: str) -> dict[str, Any]:
    """What a row says of the compiled kernel itself, given its disassembly; `hottest_loop` only where it can be estimated."""
    num_warps = machine_code.all_warps(compiled)
    found = disassembly.resources(compiled)
    blocks, limit = machine_code.occupancy(found, num_warps, arch)
    row = {
        "num_warps": num_warps, "registers": found.registers, "spilled_bytes": found.spilled_bytes,
        "shared_bytes": found.shared_bytes, "blocks_per_sm": blocks, "limited_by": limit,
        "matrix_instructions": machine_code.matrix_instructions(text), "tma_loads": machine_code.tma_loads(text),
    }  # fmt: skip
    if arch in machine_code.RATES and not machine_code.specialized(compiled):
        (loop, clocks), (seldom, seldom_clocks), _ = machine_code.loop_clocks(compiled, text, arch)
        moved_bytes, access_bytes = machine_code.moved(loop, num_warps)
        row["hottest_loop"] = {
            "instructions": len(loop),
            "moved_bytes": moved_bytes,
            "access_bytes": access_bytes,
            "clocks": rounded(clocks),
            "estimate": {
                name: round(value, 3) if isinstance(value, float) else value
                for name, value in machine_code.bounds(clocks).items()
            },
        }
        if seldom:
            row["hottest_loop"]["now_and_then"] = {
                "instructions": len(seldom),
                "clocks": rounded(seldom_clocks),
            }
    return row


def rounded(clocks: dict[str, float]) -> dict[str, float]:
    """Clocks as a row holds them."""
    return {pipe: round(value, 1) for pipe, value in clocks.items()}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEYS)


def regressions(rows: Sequence[dict], held: Sequence[dict]) -> list[str]:
    """What got worse since the `held` rows: spills, lost matrix instructions or bulk loads, narrower accesses, other rows."""
    old = {_key(row): row for row in held}
    worse = []
    for row in rows:
        label = " ".join(_key(row))
        before = old.pop(_key(row), None)
        if before is None:
            worse.append(f"{label}: not in the held table")
            continue
        if row["spilled_bytes"] > before["spilled_bytes"]:
            worse.append(
                f"{label}: spills {row['spilled_bytes']} bytes, held {before['spilled_bytes']}"
            )
        worse += [
            f"{label}: lost {name}"
            for name in before["matrix_instructions"]
            if name not in row["matrix_instructions"]
        ]
        if before["tma_loads"] and not row["tma_loads"]:
            worse.append(f"{label}: lost its TMA loads")
        access, held_access = (
            r.get("hottest_loop", {}).get("access_bytes", 0) for r in (row, before)
        )
        if 0 < access < held_access:
            worse.append(f"{label}: loads and stores {access} bytes at a time, held {held_access}")
    return worse + [f"{' '.join(key)}: gone" for key in old]


def _print_table(rows: Sequence[dict]) -> None:
    console = Console(width=None if Console().is_terminal else 200)
    table = Table(
        "operator",
        "shape",
        "kernel",
        "arch",
        title=f"triton {triton.__version__}, {DTYPE}".replace("torch.", ""),
    )
    for title in (
        "warps",
        "registers",
        "spilled B",
        "shared B",
        "blocks/SM",
        "limit",
        "matrix",
        "TMA",
        "compile s",
    ):
        table.add_column(title, justify="left" if title in ("limit", "matrix") else "right")
    for row in rows:
        matrix = (
            ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
            or "none"
        )
        values = [
            row[key]
            for key in (
                *KEYS,
                "num_warps",
                "registers",
                "spilled_bytes",
                "shared_bytes",
                "blocks_per_sm",
            )
        ]
        table.add_row(
            *map(str, values),
            row["limited_by"],
            matrix,
            str(row["tma_loads"]),
            f"{row['compile_seconds']:.2f}",
        )
    console.print(table)
    loops = [row for row in rows if "hottest_loop" in row]
    if not loops:
        return
    pipes = list(loops[0]["hottest_loop"]["clocks"])
    table = Table(
        *KEYS, "instructions", "moved B", "access B", *pipes, "of", "overlapped", "serial",
        title="ESTIMATED clocks of a block's pass through its hottest loop, and share of the ceiling they allow",
    )  # fmt: skip
    for row in loops:
        loop, estimate = row["hottest_loop"], row["hottest_loop"]["estimate"]
        clocks = [f"{value:.0f}" for value in loop["clocks"].values()]
        shares = [f"{estimate[name]:.0%}" for name in ("overlapped", "serial")]
        counts = [str(loop[name]) for name in ("instructions", "moved_bytes", "access_bytes")]
        table.add_row(*(row[key] for key in KEYS), *counts, *clocks, estimate["of"], *shares)
    console.print(table)


def _print_changes(rows: Sequence[dict], old: dict[str, Any]) -> None:
    before = {_key(row): row for row in old["rows"]}
    names = (
        "registers",
        "spilled_bytes",
        "shared_bytes",
        "blocks_per_sm",
        "matrix_instructions",
        "tma_loads",
    )
    print(f"since commit {old['commit']} of {old['date']}, triton {old['triton']}:")
    changed = False
    for row in rows:
        then = before.pop(_key(row), None)
        changes = (
            ["new"]
            if then is None
            else [f"{n} {then[n]} -> {row[n]}" for n in names if then[n] != row[n]]
        )
        if changes:
            changed = True
            print("  " + " ".join(_key(row)) + ": " + ", ".join(changes))
    made = {name: {row[name] for row in rows} for name in ("operator", "arch")}
    for key, row in before.items():
        if row["operator"] in made["operator"] and row["arch"] in made["arch"]:
            changed = True
            print("  " + " ".join(key) + ": gone")
    if not changed:
        print("  no row changed")


def _read(path: Path) -> dict[str, Any]:
    record = read_record(path, "codegen")
    wanted = {
        *KEYS,
        "registers",
        "spilled_bytes",
        "shared_bytes",
        "blocks_per_sm",
        "matrix_instructions",
        "tma_loads",
    }
    rows = record.get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and wanted <= set(row) for row in rows
    ):
        raise InputError(
            f"{path}: expected rows with {', '.join(sorted(wanted))}, got others; measure again"
        )
    return record


def _refuse_to_cut(out: Path, chosen: Sequence[Operator], archs: Sequence[str]) -> None:
    """A table of more operators or architectures than these is not to be replaced by one of these alone."""
    names = {operator.name for operator in chosen}
    left_out = [
        row
        for row in _read(out)["rows"]
        if row["operator"] not in names or row["arch"] not in archs
    ]
    if left_out:
        raise InputError(
            f"{out}: expected no row of other operators or architectures, got {len(left_out)}; name another file"
        )


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench codegen`. Returns: exit status."""
    options = parse(CodegenOptions, argv, prog="tritium bench codegen", description=HELP)
    known = {name: operator for name, operator in OPERATORS.items() if operator.launches}
    for word, words, what in [
        (name, known, "operator with kernels") for name in options.operators
    ] + [(name, TARGETS, "architecture") for name in options.arch]:
        if word not in words:
            raise InputError(
                f"tritium bench codegen: no {what} {word!r}; near: {near(word, list(words))}"
            )
    if not options.arch:
        raise InputError(f"--arch: expected one or more of {', '.join(TARGETS)}, got none")
    old = _read(Path(options.compare)) if options.compare else None
    out = None if options.out is None else writable(Path(options.out))
    chosen = [known[name] for name in options.operators or known]
    if out and out.exists():
        _refuse_to_cut(out, chosen, options.arch)
    began = time.perf_counter()
    # Anew each time: a kernel out of the cache would be said to compile in no time.
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        rows = rows_of(chosen, options.arch)
    _print_table(rows)
    print(
        f"{len(rows)} rows in {time.perf_counter() - began:.0f} s; commit {provenance()['commit']}"
    )
    if old:
        _print_changes(rows, old)
    if out:
        write_record(out, "codegen", {"dtype": str(DTYPE), "rows": rows})
    return 0
