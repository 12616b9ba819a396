"""tritium bench codegen: compile every kernel as it ships, for GPUs that need not be present.

A row is one kernel of an operator at one shape for one GPU architecture. Kernels that are not the
default yet have rows too. The columns:

    registers, spilled_bytes      per thread
    shared_bytes                  per block
    blocks_per_sm, limited_by     how many blocks fit on a multiprocessor, and what limits them
    matrix_instructions           count per name, in the whole kernel
    tma_loads                     bulk tensor loads in the whole kernel
    serialized                    whether matrix instructions wait for each other, as NVIDIA's
                                  assembler warns or as a loop shows
    hottest_loop                  NVIDIA only: instructions per iteration, their mix, bytes of
                                  global memory per block and per lane and access
    compile_seconds

The golden tables bench/results/codegen-triton-*.json hold the rows that were accepted last.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from rich.table import Table

from ...errors import InputError, plural
from ...train.commands.cli import parse
from ...train.storage.records import check_names
from ...train.terminal.progress import table_console
from ..ops import OPERATORS, choose
from ..ops.case import Operator, outputs_and_leaves
from ..record import check_writable, provenance, read_record, write_record
from . import disassembly, machine_code
from .launches import TARGETS, Launch, RunLaunchers, compile_launch, record_launches

# The trainer runs the kernels in this dtype.
DTYPE = torch.bfloat16
# Kernels that a GPU runs faster with serialized matrix instructions: see _tile_choice.py.
SERIALIZED = ("_causal_attention_bwd_dkdv_kernel",)
KEYS = ("operator", "shape", "kernel", "arch")
FIGURES = (
    "registers",
    "spilled_bytes",
    "shared_bytes",
    "blocks_per_sm",
    "matrix_instructions",
    "tma_loads",
    "serialized",
)
HELP = f"""Compile every kernel as it ships and read its machine code. No GPU is needed.


operators: {", ".join(OPERATORS)}; default: all"""


@dataclass(frozen=True, kw_only=True)
class CodegenOptions:
    """Options of `tritium bench codegen`."""

    operators: tyro.conf.Positional[tuple[str, ...]] = ()
    """Operators; default: all."""
    arch: tuple[str, ...] = tuple(TARGETS)
    """sm_80, sm_90, sm_100, sm_120, gfx942, gfx950."""
    out: str | None = None
    """Also write the rows to this file, as JSON."""
    compare: str | None = None
    """JSON of an earlier run: print what changed since."""


# --- rows


def operator_launches(
    operator: Operator, shape: Sequence[int], dtype: torch.dtype, arch: str
) -> list[Launch]:
    """Return the launches of an operator's forward and backward at one shape."""
    inputs = operator.make_inputs(shape, dtype, torch.device("meta"))
    with record_launches(arch) as launches, RunLaunchers():
        outputs, leaves = outputs_and_leaves(operator.ours, inputs)
        if leaves:
            grads = [torch.empty_like(output) for output in outputs]
            torch.autograd.grad(outputs, list(leaves.values()), grads)
    return launches


def rows_of(operators: Sequence[Operator], archs: Sequence[str]) -> list[dict[str, Any]]:
    """Compile the operators' launches for each architecture. Return the rows of the JSON."""
    found = list(_compiled(operators, archs))
    texts = disassembly.disassemblies([compiled for _, compiled, _ in found])
    return [
        {**keys, **describe(compiled, text, keys["arch"]), "compile_seconds": round(seconds, 3)}
        for (keys, compiled, seconds), text in zip(found, texts, strict=True)
    ]


def _compiled(
    operators: Sequence[Operator], archs: Sequence[str]
) -> Iterator[tuple[dict[str, str], Any, float]]:
    """Yield the keys of a row, the compiled kernel and the seconds that took."""
    for operator in operators:
        shipped: set[str] = set()
        shapes = [(shape, nullcontext) for shape in operator.launch_shapes]
        for shape, variant in (*shapes, *operator.launch_variants):
            for arch in archs:
                with variant():
                    launches = operator_launches(operator, shape, DTYPE, arch)
                # A kernel that is launched several times has one row, of its first launch.
                first = {_name(launch): launch for launch in reversed(launches)}
                if variant is nullcontext:
                    shipped |= set(first)
                else:
                    first = {name: first[name] for name in sorted(first.keys() - shipped)}
                for kernel, launch in first.items():
                    values = (operator.name, operator.label(shape), kernel, arch)
                    began = time.perf_counter()
                    compiled = compile_launch(launch, arch)
                    seconds = time.perf_counter() - began
                    yield dict(zip(KEYS, values, strict=True)), compiled, seconds


def _name(launch: Launch) -> str:
    """Return the name of a kernel, with that of its epilogue if it has one."""
    epilogue = launch.arguments.get("EPILOGUE")
    return launch.kernel.__name__ + (f" with {epilogue.__name__}" if epilogue else "")


def describe(compiled, text: str, arch: str) -> dict[str, Any]:
    """Return the figures of a row.

    Args:
        text: disassembly of the compiled kernel.
    """
    num_warps = machine_code.all_warps(compiled)
    used = disassembly.resources(compiled)
    blocks, limit = machine_code.occupancy(used, num_warps, arch)
    row = {
        "num_warps": num_warps,
        "registers": used.registers,
        "spilled_bytes": used.spilled_bytes,
        "shared_bytes": used.shared_bytes,
        "blocks_per_sm": blocks,
        "limited_by": limit,
        "matrix_instructions": machine_code.matrix_instructions(text),
        "tma_loads": machine_code.tma_loads(text),
        "serialized": is_serialized(compiled, text),
    }
    if arch.startswith("sm_") and not machine_code.is_specialized(compiled):
        loop = machine_code.hottest_loop(text)
        row["hottest_loop"] = {
            "instructions": len(loop),
            "moved_bytes": machine_code.moved_bytes(loop, num_warps),
            "access_bytes": machine_code.access_bytes(loop),
            "mix": machine_code.instruction_mix(loop),
        }
    return row


def is_serialized(compiled, text: str) -> bool:
    """Whether the matrix instructions of a compiled kernel wait for each other."""
    warnings = disassembly.performance_warnings(compiled)
    return any("serialized" in line for line in warnings) or machine_code.is_serialized(text)


# --- comparison with earlier rows


def _by_key(rows: Sequence[dict]) -> dict[str, dict]:
    return {" ".join(row[name] for name in KEYS): row for row in rows}


def regressions(rows: Sequence[dict], golden: Sequence[dict]) -> list[str]:
    """Return what is worse than in the golden rows.

    That is: more spills, lost matrix instructions or bulk loads, narrower accesses, other rows.
    Serialized matrix instructions are reported even if the golden row has them, except for kernels
    of SERIALIZED.
    """
    now, before = _by_key(rows), _by_key(golden)
    worse = [f"{key}: not in the golden table" for key in now.keys() - before.keys()]
    worse += [f"{key}: gone" for key in before.keys() - now.keys()]
    for key in now.keys() & before.keys():
        row, old = now[key], before[key]
        if row["spilled_bytes"] > old["spilled_bytes"]:
            worse.append(
                f"{key}: spills {row['spilled_bytes']} bytes, golden {old['spilled_bytes']}"
            )
        is_measured = row["kernel"] in SERIALIZED and old["serialized"]
        if row["serialized"] and not is_measured:
            worse.append(f"{key}: matrix instructions are serialized")
        lost = old["matrix_instructions"].keys() - row["matrix_instructions"].keys()
        worse += [f"{key}: lost {name}" for name in lost]
        if old["tma_loads"] and not row["tma_loads"]:
            worse.append(f"{key}: lost its TMA loads")
        access = row.get("hottest_loop", {}).get("access_bytes", 0)
        old_access = old.get("hottest_loop", {}).get("access_bytes", 0)
        if 0 < access < old_access:
            worse.append(f"{key}: accesses {access} bytes at a time, golden {old_access}")
    return sorted(worse)


def changes(rows: Sequence[dict], old: Sequence[dict]) -> list[str]:
    """Return every difference to earlier rows of the same operators and architectures."""
    operators, archs = ({row[name] for row in rows} for name in ("operator", "arch"))
    before = _by_key(row for row in old if row["operator"] in operators and row["arch"] in archs)
    now = _by_key(rows)
    lines = []
    for key in sorted(now.keys() | before.keys()):
        if key not in before or key not in now:
            lines.append(f"{key}: {'new' if key in now else 'gone'}")
            continue
        row, then = now[key], before[key]
        changed = [f"{n} {then[n]} -> {row[n]}" for n in FIGURES if then[n] != row[n]]
        if changed:
            lines.append(f"{key}: {', '.join(changed)}")
    return lines


# --- the command


def _print_tables(rows: Sequence[dict]) -> None:
    console = table_console(200)
    table = Table(*KEYS, title=f"triton {triton.__version__}, {DTYPE}".replace("torch.", ""))
    for title in ("warps", "registers", "spilled B", "shared B", "blocks/SM"):
        table.add_column(title, justify="right")
    for title in ("limited by", "matrix", "TMA", "serialized", "compile s"):
        table.add_column(title, justify="right" if title in ("TMA", "compile s") else "left")
    for row in rows:
        figures = [row[name] for name in ("num_warps", *FIGURES[:4])]
        matrix = _counts(row["matrix_instructions"]) or "none"
        seconds = f"{row['compile_seconds']:.2f}"
        table.add_row(
            *(row[key] for key in KEYS),
            *map(str, figures),
            row["limited_by"],
            matrix,
            str(row["tma_loads"]),
            "yes" if row["serialized"] else "no",
            seconds,
        )
    console.print(table)

    loops = [row for row in rows if "hottest_loop" in row]
    if not loops:
        return
    title = "hottest loop: global bytes per block and iteration, bytes per lane and access"
    table = Table(*KEYS, "instructions", "moved B", "access B", "mix", title=title)
    for row in loops:
        loop = row["hottest_loop"]
        counts = [str(loop[name]) for name in ("instructions", "moved_bytes", "access_bytes")]
        table.add_row(*(row[key] for key in KEYS), *counts, _counts(loop["mix"]))
    console.print(table)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _read(path: Path) -> dict[str, Any]:
    record = read_record(path, "codegen")
    wanted = {*KEYS, *FIGURES}
    rows = record.get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and wanted <= set(row) for row in rows
    ):
        fields = ", ".join(sorted(wanted))
        raise InputError(f"{path}: expected rows with {fields}, got others; measure again")
    for name in ("commit", "date", "triton"):
        if name not in record:
            raise InputError(f"{path}: expected a record with the key {name!r}; measure again")
    return record


def _check_complete(out: Path, chosen: Sequence[Operator], archs: Sequence[str]) -> None:
    """Raise if the file has rows that this run would not measure again."""
    names = {operator.name for operator in chosen}
    lost = [
        row
        for row in _read(out)["rows"]
        if row["operator"] not in names or row["arch"] not in archs
    ]
    if lost:
        raise InputError(
            f"{out}: expected no row of other operators or architectures, got {len(lost)}; "
            "name another file"
        )


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench codegen`. Returns: exit status."""
    # Check the options.
    options = parse(CodegenOptions, argv, prog="tritium bench codegen", description=HELP)
    chosen = choose(options.operators)
    check_names("architecture", options.arch, TARGETS)
    if not options.arch:
        raise InputError(f"--arch: expected one or more of {', '.join(TARGETS)}, got none")
    old = _read(Path(options.compare)) if options.compare else None
    out = check_writable(options.out)
    if out and out.exists():
        _check_complete(out, chosen, options.arch)

    # Compile everything again: a cached kernel would show no time to compile.
    began = time.perf_counter()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        rows = rows_of(chosen, options.arch)
    seconds = time.perf_counter() - began

    # Show and write.
    _print_tables(rows)
    print(f"{plural(len(rows), 'row')} in {seconds:.0f} s; commit {provenance()['commit']}")
    if old:
        print(f"since commit {old['commit']} of {old['date']}, triton {old['triton']}:")
        for line in changes(rows, old["rows"]) or ["no row changed"]:
            print(f"  {line}")
    if out:
        write_record(out, "codegen", {"dtype": str(DTYPE), "rows": rows})
    return 0
