"""The generated parts of the pages of docs/operators, from the code and from bench/results."""

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

from ... import kernels
from .. import RESULTS, ROOT
from ..ops import OPERATORS
from ..record import describe_provenance, read_record, records_below
from ._docstring import to_markdown

CODEGEN = RESULTS / "codegen-triton-3.7.1.json"
# The architecture of the large table. The small table has all.
ARCH = "sm_90"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Record = dict[str, Any]


def table(heads: list[str], rows: list[list[str]], *, texts: int = 1) -> str:
    """Return a Markdown table. The first `texts` columns are text, the others are numbers."""
    rule = ["---" if column < texts else "--:" for column in range(len(heads))]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


# --- from the code


def signature(*names: str) -> str:
    """Return the signatures and the docstrings of public operators."""
    parts = []
    for name in names:
        function = getattr(kernels, name)
        text = f"{name}{_short_signature(function)}"
        parts.append(f"```text\n{text}\n\n{inspect.getdoc(function).strip()}\n```")
    return "\n\n".join(parts)


def _short_signature(function) -> str:
    """Return a signature with a parameter per line if it has more than 80 characters."""
    text = str(inspect.signature(function)).replace("torch.", "")
    if len(text) <= 80:
        return text
    parameters, _, result = text[1:].rpartition(") -> ")
    lines, depth, begin = [], 0, 0
    for place, letter in enumerate(parameters):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            lines.append(parameters[begin : place + 1].strip())
            begin = place + 1
    lines.append(f"{parameters[begin:].strip()},")
    return "(\n    " + "\n    ".join(lines) + f"\n) -> {result}"


def definition(file: str) -> str:
    """Return the docstring of a kernel file."""
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    return f"From the docstring of `{file}`.\n\n{to_markdown(docstring)}"


def cost(*names: str) -> str:
    """Return the minimum bytes and the FLOPs at the shapes of the benchmark, in 16 bits."""
    rows = []
    for name in names:
        operator = OPERATORS[name]
        for shape in operator.shapes:
            cost = operator.cost(*shape, 2)
            cells = [f"`{name}`", operator.label(shape)]
            for direction in ("fwd", "bwd"):
                moved, flops = (cost.get(f"{direction}_{unit}") for unit in ("bytes", "flops"))
                cells.append("-" if moved is None else f"{moved / 1e6:,.0f}")
                cells.append("-" if flops is None else f"{flops / 1e9:,.1f}")
            rows.append(cells)
    heads = ["operator", "shape", "forward, MB", "GFLOP", "backward, MB", "GFLOP"]
    return (
        "The minimum number of bytes to move and the FLOPs, from `cost()` of the kernel file, with "
        f"2\nbytes per element:\n\n{table(heads, rows, texts=2)}"
    )


# --- from bench/results


def errors(*names: str) -> str:
    """Return errors against float64: of the kernels in the interpreter, and of the references."""
    parts = []
    for runs, what in (
        ("interpreter", "The Triton kernels in Triton's interpreter on a CPU"),
        ("reference", "The PyTorch references on a CPU"),
    ):
        record = read_record(RESULTS / f"errors-{runs}.json", "errors")
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for row in record["rows"]:
            if row["operator"] in names:
                variant = row["implementation"].removeprefix("tritium")
                key = (f"`{row['operator']}`{variant}", row["shape"], row["value"])
                cell = f"{row['error']:.1e} ({row['pytorch_error']:.1e})"
                cells.setdefault(key, {})[row["dtype"]] = cell
        heads = ["operator", "shape", "value", *DTYPES.values()]
        rows = [[*key, *(row[dtype] for dtype in DTYPES)] for key, row in cells.items()]
        parts.append(f"{what} ({describe_provenance(record)}):\n\n{table(heads, rows, texts=3)}")
    return "\n\n".join([_how_to_read("errors"), *parts])


def _how_to_read(section: str) -> str:
    return f"[How to read these tables](index.md#{section})."


def machine_code(*names: str) -> str:
    """Return the machine code of the kernels of operators, in two tables per operator."""
    record = read_record(CODEGEN, "codegen")
    dtype = record["dtype"].removeprefix("torch.")
    parts = [
        f"{_how_to_read('machine-code')} Compiled without a GPU, in {dtype} "
        f"(triton {record['triton']}, {record['date']},\ncommit {record['commit']}). "
        f"Each operator has two tables. The first is for {ARCH}. The second has the registers per\n"
        "thread on each architecture; the number after a plus sign is spilled bytes."
    ]
    for name in names:
        found = [row for row in record["rows"] if row["operator"] == name]
        heads = ["kernel", "size", "registers", "spilled, B", "shared, B", "occupancy"]
        heads += ["limited by", "tensor instructions"]
        rows = [[_kernel(row), _size(row), *_figures(row)] for row in found if row["arch"] == ARCH]
        archs = list(dict.fromkeys(row["arch"] for row in found))
        registers: dict[tuple[str, str], dict[str, str]] = {}
        for row in found:
            spilled = f" + {row['spilled_bytes']}" if row["spilled_bytes"] else ""
            cells = registers.setdefault((_kernel(row), _size(row)), {})
            cells[row["arch"]] = f"{row['registers']}{spilled}"
        small = [
            [*key, *(cells.get(arch, "-") for arch in archs)] for key, cells in registers.items()
        ]
        parts += [
            f"`{name}`:",
            table(heads, rows, texts=2),
            table(["kernel", "size", *archs], small, texts=2),
        ]
    return "\n\n".join(parts)


def _kernel(row: Record) -> str:
    """Return the name of a kernel, and of its epilogue, without what all names share."""
    kernel, _, epilogue = row["kernel"].partition(" with ")
    name = kernel.removeprefix("_").removesuffix("_kernel")
    return f"{name} + {epilogue.removeprefix('_')}" if epilogue else name


def _size(row: Record) -> str:
    """Return the sizes on which the tiles of a kernel depend: the last one, and T for attention."""
    *others, last = row["shape"].split()
    if not row["operator"].startswith("causal_attention"):
        return last
    return " ".join([*(size for size in others if size.startswith("T=")), last])


def _figures(row: Record) -> list[str]:
    """Return the cells of the large table."""
    warps = row["blocks_per_sm"] * row["num_warps"]
    matrix = [f"{count} {name}" for name, count in row["matrix_instructions"].items()]
    if row["serialized"]:
        matrix.append("serialized")
    return [
        *(f"{row[name]:,}" for name in ("registers", "spilled_bytes", "shared_bytes")),
        f"{row['blocks_per_sm']} x {row['num_warps']} warps, {100 * warps / 64:.0f} %",
        row["limited_by"],
        ", ".join(matrix) or "-",
    ]


def gpu_times(*names: str) -> str:
    """Return the times that were measured on GPUs: of operators alone, and in a training step."""
    parts = [*_alone(names), *_tuned(names), *_in_a_step(names)]
    return "\n\n".join(parts) or "Not measured on a GPU yet."


def _alone(names: tuple[str, ...]) -> Iterator[str]:
    """Yield a table per operator and shape of each record of `tritium bench kernels`."""
    for record in records_below(RESULTS, ["kernels"]):
        for entry in record["entries"]:
            if entry["operator"] not in names or record["device"] != "cuda":
                continue
            times: dict[str, dict[str, str]] = {}
            for row in entry["rows"]:
                median = f"{1e6 * row['seconds']['median']:,.1f}"
                times.setdefault(row["implementation"], {})[row["direction"]] = median
            directions = list(dict.fromkeys(row["direction"] for row in entry["rows"]))
            rows = [
                [name, *(cells.get(direction, "-") for direction in directions)]
                for name, cells in times.items()
            ]
            dtype = record["dtype"].removeprefix("torch.")
            yield (
                f"`{entry['operator']}`, {entry['label']}, {dtype}, median microseconds\n"
                f"({describe_provenance(record)}):\n\n{table(['', *directions], rows)}"
            )


def _tuned(names: tuple[str, ...]) -> Iterator[str]:
    """Yield a table per shape of each record of `tritium bench tune`, without its variants.

    Skips operators that `tritium bench kernels` timed on the same GPU.
    """
    timed = {
        (entry["operator"], record["gpu"])
        for record in records_below(RESULTS, ["kernels"])
        for entry in record["entries"]
    }
    for record in records_below(RESULTS, ["tune"]):
        if record["operator"] not in names or record["device"] != "cuda":
            continue
        if (record["operator"], record["gpu"]) in timed:
            continue
        for entry in record["entries"]:
            variants = {"as shipped": "tritium", "cublas": "cuBLAS, elementwise kernels"}
            rows = [
                [
                    label,
                    *(f"{1e6 * each['median']:,.1f}" for each in entry["seconds"][name].values()),
                ]
                for name, label in variants.items()
                if name in entry["seconds"]
            ]
            heads = ["", *entry["seconds"]["as shipped"]]
            yield (
                f"`{record['operator']}`, {entry['label']}, with the launch sizes of commit "
                f"{record['commit']}, median\nmicroseconds ({describe_provenance(record)}):\n\n"
                f"{table(heads, rows)}"
            )


def _in_a_step(names: tuple[str, ...]) -> Iterator[str]:
    """Yield a table of the operators' part of a training step, from profiles."""
    predictions = records_below(RESULTS, ["predict"])
    records = [record for record in predictions if "measured" in record["steps"][0]]
    rows, places = [], []
    for record in records:
        step = record["steps"][0]
        found = [row for row in step["measured"]["rows"] if _is_of(row["operator"], names)]
        for row in found:
            rows.append(
                [
                    f"`{row['operator'].removeprefix('tritium::')}`",
                    record["gpu"],
                    f"{row['calls']:.0f}",
                    f"{1e3 * row['seconds']:.2f}",
                    f"{1e6 * row['seconds'] / row['calls']:.0f}",
                ]
            )
        places.append(
            f"- {record['gpu']}: {record['date']}, commit {record['commit']}, torch "
            f"{record['torch']}, triton {record['triton']}"
        )
    if rows:
        step = records[0]["steps"][0]
        heads = ["operator", "GPU", "kernels per step", "ms per step", "µs per kernel"]
        yield (
            f"In a training step of {step['recipe']} with {step['batch']} x "
            f"{step['context_tokens']:,} tokens, from PyTorch's profiler, without the matmuls\n"
            f"of cuBLAS:\n\n{table(heads, rows, texts=2)}\n\n" + "\n".join(places)
        )


def _is_of(operator: str, names: tuple[str, ...]) -> bool:
    """Whether tritium::NAME_fwd is an implementation of one of the operators."""
    name = operator.removeprefix("tritium::")
    return name != operator and re.sub("_(fwd|bwd|add|scale)$", "", name) in names


SECTIONS = {
    "signature": signature,
    "definition": definition,
    "cost": cost,
    "errors": errors,
    "machine-code": machine_code,
    "gpu-times": gpu_times,
}
