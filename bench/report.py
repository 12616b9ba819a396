"""tritium bench report: write bench/results/REPORT.md from the JSON files next to it.

Given another folder, print the report of its JSON files and write nothing.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ..errors import InputError
from ..train.commands.cli import parse
from . import RESULTS
from ._run_tables import nanogpt_table, runs_table, sweep_table
from .record import FORMAT, check_checkout, describe_provenance, records_below

REPORT = RESULTS / "REPORT.md"
HEAD = """# Measurements

Written by `tritium bench report` from the JSON files in this folder; do not edit it. Each table
names the device, date, commit and versions of its file.

Records of commit bb0f4b2 and older have two errors. Ceilings of memory bandwidth are too low,
because they were measured with copy nodes of a CUDA graph. Times of forward and backward together
include filling the gradients of the outputs."""
NO_GPU = """No file here is from a GPU yet, so no speed on a GPU is stated. On a CPU PyTorch
references run instead of the kernels, and only ratios within one run are comparable."""
CODEGEN_ARCH = "sm_90"

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `tritium bench report`."""

    folder: tyro.conf.Positional[str | None] = None
    """Print the report of this folder; default: write bench/results/REPORT.md."""


def report(folder: Path) -> str:
    """Return the report on the records in a folder and below, as Markdown.

    Raises: InputError if there are none, or if one lacks a key.
    """
    records = _records(folder)
    if not records:
        raise InputError(
            f"{folder}: expected a folder with records of format {FORMAT} "
            f"of {', '.join(SECTIONS)}, found none"
        )
    parts = [HEAD]
    if not any(map(_on_gpu, records)):
        parts.append(NO_GPU)
    for kind, (title, table) in SECTIONS.items():
        tables = []
        for record in records:
            if record["kind"] == kind:
                with _names_file(record):
                    tables.append(table(record))
        if tables:
            parts += [f"## {title}", *tables]
    return "\n\n".join(parts) + "\n"


def _records(folder: Path) -> list[Record]:
    """Return the records of a known kind.

    Of several codegen records only one is returned: the newest Triton among those with the most
    architectures.
    """
    records = records_below(folder, SECTIONS)
    codegen = [record for record in records if record["kind"] == "codegen"]
    chosen = max(codegen, key=_architectures_and_triton, default=None)
    return [record for record in records if record["kind"] != "codegen" or record is chosen]


def _architectures_and_triton(record: Record) -> tuple[int, str]:
    with _names_file(record):
        return len({row["arch"] for row in record["rows"]}), record["triton"]


@contextlib.contextmanager
def _names_file(record: Record) -> Iterator[None]:
    """Raise InputError with the file of a record if the context does not find a key in it."""
    try:
        yield
    except KeyError as error:
        raise InputError(
            f"{record['file']}: expected a record of kind {record['kind']!r} with the key {error}, "
            "found none; measure again"
        ) from None


def _on_gpu(record: Record) -> bool:
    return record.get("device") == "cuda"


def _kernels_table(record: Record) -> str:
    """Return forward plus backward of each implementation: microseconds, or ratios on a CPU."""
    on_gpu = _on_gpu(record)
    names = list(
        dict.fromkeys(row["implementation"] for entry in record["entries"] for row in entry["rows"])
    )
    dtype = record["dtype"].removeprefix("torch.")
    copy = record["ceilings"]["bytes_per_second"] / 1e12
    matmul = record["ceilings"]["flops_per_second"] / 1e12
    unit = "median µs" if on_gpu else "median time divided by eager's"
    lines = [
        f"Forward / backward / both (attention_decode: forward), {unit}, {dtype}"
        if on_gpu
        else f"Forward plus backward (attention_decode: forward), {unit}, {dtype}",
        f"({describe_provenance(record)};",
        f"measured ceilings: {copy:.2f} TB/s, {matmul:,.0f} TFLOP/s; *: not a CUDA graph):"
        if on_gpu
        else "no Triton kernel ran):",
        "",
        f"| operator | shape | {' | '.join(names)} |" + " tritium, of ceiling |" * on_gpu,
        "|---|---|" + "--:|" * (len(names) + on_gpu),
    ]
    for entry in record["entries"]:
        # The last row of an implementation has all of its directions.
        rows = {row["implementation"]: row for row in entry["rows"]}
        medians = {name: row["seconds"]["median"] for name, row in rows.items()}
        if on_gpu:
            cells = {
                name: " / ".join(
                    f"{row['seconds']['median'] * 1e6:,.1f}{_mark(row)}"
                    for row in entry["rows"]
                    if row["implementation"] == name
                )
                for name in medians
            }
        else:
            eager = medians.get("eager", math.nan)
            cells = {name: f"{seconds / eager:.2f}" for name, seconds in medians.items()}
        cells |= dict.fromkeys(entry["failed"], "failed")
        line = [f"`{entry['operator']}`", entry["label"], *(cells.get(n, "-") for n in names)]
        if on_gpu:
            line.append(f"{rows['tritium']['share']:.0%}" if "tritium" in rows else "failed")
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def _mark(row: Record) -> str:
    """Return a star for a time that is not of a CUDA graph, and may include the host's time."""
    return "*" if row["seconds"].get("timed_by") == "backlog" else ""


def training_table(record: Record, *, speeds: bool) -> str:
    """Return the ratios of a training record, with tokens per second, MFU and memory if asked."""
    columns = ["tokens/s", "MFU", "step, median ms", "p10-p90 ms", "peak memory, GB"] * speeds
    columns.append("speedup of tritium")
    micro_batch = record["micro_batch_size"]
    batch_size = record.get("batch_size", micro_batch)
    batch = f"{batch_size} x {record['context_tokens']} tokens per step"
    if batch_size > micro_batch:
        batch += f" in micro-batches of {micro_batch}"
    if _on_gpu(record):
        if not any(row["compiled"] for row in record["implementations"].values()):
            batch += ", without torch.compile"
        if not record.get("cuda_graph", True):
            batch += ", without CUDA graphs"
    ratios = [row["ratio"] for row in record["implementations"].values()]
    is_one_round = all(ratio["p10"] == ratio["p90"] for ratio in ratios)
    lines = [
        f"{record['recipe']}, vocabulary of {record['shape']['vocab_size']:,}, {batch}, "
        f"{record['dtype']}",
        f"({describe_provenance(record)});",
        "one round of steps:"
        if is_one_round
        else "ratios are medians of the rounds, p10 to p90 in brackets:",
        "",
        f"| | {' | '.join(columns)} |",
        "|---|" + "--:|" * len(columns),
    ]
    for name, row in record["implementations"].items():
        step, peak, ratio = row["step_seconds"], row["peak_memory_bytes"], row["ratio"]
        cells = [
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{step['median'] * 1e3:.1f}",
            f"{step['p10'] * 1e3:.1f}-{step['p90'] * 1e3:.1f}",
            "-" if peak is None else f"{peak / 1e9:.1f}",
        ] * speeds
        has_rounds = ratio["p10"] != ratio["p90"]  # one round has no spread
        spread = f" ({ratio['p10']:.2f}-{ratio['p90']:.2f})" if has_rounds else ""
        cells.append(f"{ratio['median']:.2f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic_table(record: Record) -> str:
    """Return bytes per token of each preset's block."""
    names, directions = ("tritium", "eager"), ("forward", "backward")
    heads = [f"{name} forward | backward | sum" for name in (*names, "least")]
    dtype = record["dtype"].removeprefix("torch.")
    lines = [
        f"Bytes that a block moves per token, {dtype}, and in brackets as multiples of D elements.",
        "Counted from the operators that run, not timed",
        f"(commit {record['commit']}, torch {record['torch']}). MB per step: weights, their",
        "gradients and partial sums, which do not depend on the number of tokens.",
        "`bench/training/traffic.py` derives the least and describes one pass, which is not the",
        "default:",
        "",
        f"| | {' | '.join(heads)} | one pass sum | MB per step, {' / '.join(names)} |",
        f"|---|{'--:|' * (3 * len(heads) + 2)}",
    ]
    for row in record["blocks"]:
        counts = [
            [row[name][direction]["token_bytes"] for direction in directions] for name in names
        ]
        counts.append([row["least"][direction] for direction in directions])
        width_bytes = row["d_model"] * record["itemsize"]
        cells = [
            f"{count:,} ({count / width_bytes:.1f})"
            for pair in counts
            for count in (*pair, sum(pair))
        ]
        one_pass = sum(row["one_pass"][direction]["token_bytes"] for direction in directions)
        cells.append(f"{one_pass:,} ({one_pass / width_bytes:.1f})")
        steps = [
            f"{sum(row[name][direction]['step_bytes'] for direction in directions) / 1e6:.1f}"
            for name in names
        ]
        lines.append(f"| {row['preset']} | {' | '.join(cells)} | {' / '.join(steps)} |")
    return "\n".join([*lines, "", *_option_lines(record)])


def _option_lines(record: Record) -> list[str]:
    """Return the bytes per token of gpt2's block with each option, and what the option adds."""
    directions = ("forward", "backward")
    first = record["blocks"][0]
    plain = [first["tritium"][direction]["token_bytes"] for direction in directions]
    lines = [
        f"The block of {first['preset']} with one option, in bytes per token, and in brackets what",
        "the option adds, as multiples of D elements:",
        "",
        "| option | forward | backward |",
        "|---|--:|--:|",
    ]
    for name, row in record["options"].items():
        counts = [row[direction]["token_bytes"] for direction in directions]
        width_bytes = first["d_model"] * record["itemsize"]
        cells = [
            f"{count:,} ({(count - base) / width_bytes:+.1f})"
            for count, base in zip(counts, plain, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _device_table(record: Record) -> str:
    """Return how the parts of a command of bench/device.sh ended."""
    lines = [
        f"`bench/device.sh {record['command']}` ({describe_provenance(record)}):",
        "",
        "| part | ended | seconds | last line, or failed tests |",
        "|---|---|--:|---|",
    ]
    for part in record["parts"]:
        note = ", ".join(part.get("failed_tests", ())) or part["last_line"]
        cells = [part["name"], part["status"], f"{part['seconds']:.0f}", note.replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _machine_table(record: Record) -> str:
    """Return the limits of a machine, and whether a training step was repeatable on it."""
    limits = record["ceilings"]
    verdicts = [
        f"{mode} {'equal' if first == second else 'NOT EQUAL'}"
        for mode, (first, second) in record["step_hashes"].items()
    ]
    return (
        f"{describe_provenance(record)}: copy {limits['bytes_per_second'] / 1e12:.2f} TB/s, matmul "
        f"{limits['flops_per_second'] / 1e12:,.0f} TFLOP/s. Weights after two equal steps of "
        f"{record['recipe']}, {record['micro_batch']} sequences: {', '.join(verdicts)}."
    )


def _tune_table(record: Record) -> str:
    """Return the times of the variants of an operator, the fastest first."""
    lines = [f"`{record['operator']}`, median us ({describe_provenance(record)}):"]
    for entry in record["entries"]:
        rows = entry["seconds"]
        directions = list(next(iter(rows.values())))
        lines += ["", f"| {entry['label']} | {' | '.join(directions)} |"]
        lines.append("|---|" + "--:|" * len(directions))
        last = directions[-1]
        for name, samples in sorted(rows.items(), key=lambda row: row[1][last]["median"]):
            cells = [f"{samples[direction]['median'] * 1e6:.1f}" for direction in directions]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for name, why in entry["failed"].items():
            lines.append(
                f"| {name} | failed: {why.replace('|', '/')} |{' |' * len(directions[1:])}"
            )
    return "\n".join(lines)


def predict_table(record: Record) -> str:
    """Return the totals of predicted steps."""
    parts = list(dict.fromkeys(part for step in record["steps"] for part in step["parts"]))
    commit = f"Commit {record['commit']}. " if "commit" in record else ""
    lines = [
        "ESTIMATES, except measured ms. `bench/training/efficiency.py` states the assumptions.",
        f"{commit}MFU is of 989.4 TFLOP/s. Parts are milliseconds of the GPU:",
        "",
        "| step | GPU | floor, ms | predicted, ms | measured, ms | tokens/s | MFU "
        f"| {' | '.join(parts)} |",
        "|---|---|" + "--:|" * (5 + len(parts)),
    ]
    for step in record["steps"]:
        measured = step.get("measured", {})
        cells = [
            f"{step['recipe']}, {step['batch']} x {step['context_tokens']} tokens in micro-batches "
            f"of {step['micro_batch']}"
            + ", backward of attention in one pass"
            * step.get("one_pass", False),
            step["gpu_name"],
            f"{1e3 * step['floor_seconds']:.1f}",
            f"{1e3 * step['seconds']:.1f}",
            f"{1e3 * measured['seconds']:.1f}" if _on_gpu(measured) else "-",
            f"{step['tokens_per_second']:,.0f}",
            f"{step['mfu']:.1%}",
            *(f"{1e3 * step['parts'].get(part, 0.0):.1f}" for part in parts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _codegen_table(record: Record) -> str:
    """Return the rows of one architecture; shapes with equal figures share a line."""
    names = ("registers", "spilled_bytes", "shared_bytes", "blocks_per_sm", "limited_by")
    shapes: dict[tuple, list[str]] = {}
    for row in record["rows"]:
        if row["arch"] == CODEGEN_ARCH:
            matrix = ", ".join(row["matrix_instructions"]) or "-"
            cells = (*(str(row[name]) for name in names), matrix)
            key = (row["operator"], row["kernel"], cells)
            shapes.setdefault(key, []).append(row["shape"].split()[-1])
    lines = [
        f"Kernels compiled for {CODEGEN_ARCH} without a GPU "
        f"(triton {record['triton']}, commit {record['commit']}):",
        "",
        "| operator | kernel | sizes | registers | spilled B | shared B | blocks/SM | limited by "
        "| matrix |",
        "|---|---|---|--:|--:|--:|--:|---|---|",
    ]
    for (operator, kernel, cells), sizes in shapes.items():
        lines.append(f"| `{operator}` | `{kernel}` | {', '.join(sizes)} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Kind of record -> title of its section, function that makes its table.
SECTIONS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "train": ("Training", lambda record: training_table(record, speeds=_on_gpu(record))),
    "kernels": ("Kernels", _kernels_table),
    "runs": ("Training runs", runs_table),
    "sweep": ("Equal processor time", sweep_table),
    "nanogpt": ("nanoGPT, measured earlier", nanogpt_table),
    "tune": ("Launch sizes", _tune_table),
    "machine": ("Machines", _machine_table),
    "predict": ("Predicted training steps", predict_table),
    "traffic": ("Memory traffic", traffic_table),
    "codegen": ("Machine code", _codegen_table),
    "device": ("Commands on a GPU machine", _device_table),
}


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench report`. Returns: exit status."""
    about = "Write bench/results/REPORT.md from the JSON files next to it."
    options = parse(ReportOptions, argv, prog="tritium bench report", description=about)
    if options.folder is None:
        check_checkout("tritium bench report without a folder")
        REPORT.write_text(report(RESULTS), encoding="utf-8")
        print(f"written: {REPORT}")
    else:
        print(report(Path(options.folder)), end="")
    return 0
