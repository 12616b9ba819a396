"""tritium bench report: README's figures from bench/results, and nothing else; or, of a folder, what it holds in short.

Every record below bench/results is read. Those measured on a GPU and those that need none become tables; where there
is none of the former yet, a sentence says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ..errors import InputError
from ..train.commands.cli import parse
from .record import FORMAT, kind_of, read_record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: written by tritium bench report -->", "<!-- end of figures -->"
KINDS = ("kernels", "train", "codegen", "traffic", "gemm_peers")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `tritium bench report`."""

    folder: tyro.conf.Positional[str | None] = None
    """Print what a folder of measurements holds, and change nothing; default: write README's figures from bench/results."""
    readme: str = str(ROOT / "README.md")
    """The file to write them into."""


def figures(results: Path = RESULTS) -> str:
    """README's figures as Markdown, from the records below `results`."""
    records = _records(results)
    on_a_gpu = [record for record in records if record.get("device") == "cuda"]
    parts = [_kernel_tables(record) for record in on_a_gpu if record["kind"] == "kernels"]
    parts += [_training_table(record) for record in on_a_gpu if record["kind"] == "train"]
    if not parts:
        parts = [
            "No GPU has measured tritium yet: `bench/results` holds no file from one, so no speed on a GPU is stated here.",
            # Estimates never stand beside measurements.
            *(_gemm_table(record) for record in records if record["kind"] == "gemm_peers"),
        ]
    parts += [traffic_tables(record) for record in records if record["kind"] == "traffic"]
    newest = max(
        (record for record in records if record["kind"] == "codegen"),
        key=lambda record: record["triton"],
        default=None,
    )
    if newest:
        parts.append(_codegen_table(newest))
    return "\n\n".join(parts)


def write_readme(readme: Path, text: str) -> bool:
    """Put `text` between the markers. Returns: whether that changed the file. Raises: InputError without markers."""
    old = readme.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise InputError(
            f"{readme}: expected one line {BEGIN!r} and one {END!r} around the figures, found none or several"
        )
    head, rest = old.split(BEGIN)
    new = f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
    if new != old:
        readme.write_text(new, encoding="utf-8")
    return new != old


def _records(folder: Path) -> list[dict[str, Any]]:
    """Every record of a known kind in `folder` and below, in the order of their paths."""
    kinds = {path: kind_of(path) for path in sorted(folder.rglob("*.json"))}
    return [read_record(path, kind) for path, kind in kinds.items() if kind in KINDS]


def _provenance(record: dict[str, Any]) -> str:
    where = (
        record["gpu"]
        if record.get("device") == "cuda"
        else f"{record['cpu']}, {record['threads']} threads"
    )
    return f"{where}; {record['date']}, commit {record['commit']}, torch {record['torch']}, triton {record['triton']}"


def _kernel_tables(record: dict[str, Any]) -> str:
    """Median microseconds of each contestant at each shape, backward included where there is one, and ours as a share."""
    names = list(
        dict.fromkeys(row["contestant"] for entry in record["entries"] for row in entry["rows"])
    )
    copy, product = (record["ceilings"][f"{unit}_per_second"] / 1e12 for unit in ("bytes", "flops"))
    lines = [
        f"Kernels, forward + backward (attention_decode: forward), median µs ({_provenance(record)};",
        f"{record['dtype'].removeprefix('torch.')}; ceilings of the same run: {copy:.2f} TB/s, {product:,.0f} TFLOP/s):",
        "",
        f"| operator | shape | {' | '.join(names)} | tritium, of ceiling |",
        f"|---|---|{'--:|' * (len(names) + 1)}",
    ]
    for entry in record["entries"]:
        # The last of a contestant's rows has all the directions it has.
        whole = {row["contestant"]: row for row in entry["rows"]}
        cells = [
            f"{whole[name]['seconds']['median'] * 1e6:,.1f}" if name in whole else _why(entry, name)
            for name in names
        ]
        share = f"{whole['tritium']['share']:.0%}" if "tritium" in whole else "refused"
        lines.append(
            f"| `{entry['operator']}` | {entry['label']} | {' | '.join(cells)} | {share} |"
        )
    return "\n".join(lines)


def _why(entry: dict[str, Any], name: str) -> str:
    return "refused" if name in entry["refused"] else "-"


def _training_table(record: dict[str, Any]) -> str:
    lines = [
        f"Training {record['recipe']} ({_provenance(record)}):",
        "",
        "| | tokens/s | MFU | step, median ms | p10-p90 ms | peak memory, GB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in record["contestants"].items():
        step, peak = row["step_seconds"], row["peak_memory_bytes"]
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| {name} | {row['tokens_per_second']:,.0f} | {mfu} | {step['median'] * 1e3:.1f} | "
            f"{step['p10'] * 1e3:.1f}-{step['p90'] * 1e3:.1f} | {'-' if peak is None else f'{peak / 1e9:.1f}'} |"
        )
    return "\n".join(lines)


def traffic_tables(record: dict[str, Any]) -> str:
    """Bytes a token of each preset's block, in brackets over the width's; the perceptron's memory, alike presets in a line."""
    names, directions = ("tritium", "eager"), ("forward", "backward")
    heads = [f"{name} forward | backward | sum" for name in (*names, "least")]
    lines = [
        "Bytes that a block moves per token, counted from the operators that run, not timed",
        f"({record['dtype'].removeprefix('torch.')}; commit {record['commit']}, torch {record['torch']}); in brackets over the "
        "width's bytes. MB a step:",
        "what does not grow with the tokens: weights, their gradients, partial sums. `bench/traffic.py` derives the least.",
        "",
        f"| | {' | '.join(heads)} | MB a step, {' / '.join(names)} |",
        f"|---|{'--:|' * (3 * len(heads) + 1)}",
    ]
    for row in record["blocks"]:
        pairs = [
            [row[name][direction]["token_bytes"] for direction in directions] for name in names
        ]
        pairs.append([row["least"][direction] for direction in directions])
        width_bytes = row["d_model"] * record["itemsize"]
        cells = [
            f"{count:,} ({count / width_bytes:.1f})"
            for pair in pairs
            for count in (*pair, sum(pair))
        ]
        steps = [
            f"{sum(row[name][direction]['step_bytes'] for direction in directions) / 1e6:.1f}"
            for name in names
        ]
        lines.append(f"| {row['preset']} | {' | '.join(cells)} | {' / '.join(steps)} |")
    groups: dict[tuple, list[str]] = {}
    for row in record["mlp"]:
        groups.setdefault((row["way"], row["kept"], row["most"], row["allocated"]), []).append(
            row["preset"]
        )
    memory = [
        f"| `{way}` | {', '.join(presets)} | {' | '.join(f'{count:.2f}' for count in counts)} |"
        for (way, *counts), presets in groups.items()
    ]
    lines += [
        "",
        "Memory of the perceptron, forward and backward, in tensors of (N, F), counted in the same run. With recompute all but",
        "what is kept comes in chunks of rows, which `allocated` counts each anew:",
        "",
        "| | width of | kept for the backward | most at once | allocated in all |",
        "|---|---|--:|--:|--:|",
        *memory,
    ]
    return "\n".join(lines)


def _codegen_table(record: dict[str, Any], arch: str = "sm_90") -> str:
    """The rows of one architecture, shapes of one kernel that came out alike in one line."""
    groups: dict[tuple, list[str]] = {}
    for row in record["rows"]:
        if row["arch"] == arch:
            matrix = ", ".join(row["matrix_instructions"]) or "-"
            cells = (
                row["registers"],
                row["spilled_bytes"],
                row["shared_bytes"],
                row["blocks_per_sm"],
                row["limited_by"],
                matrix,
            )
            key = (row["operator"], row["kernel"], cells)
            groups.setdefault(key, []).append(row["shape"].split()[-1])
    lines = [
        f"Machine code for {arch}, compiled without a GPU (triton {record['triton']}, commit {record['commit']}):",
        "",
        "| operator | kernel | sizes | registers | spilled B | shared B | blocks/SM | limited by | matrix |",
        "|---|---|---|--:|--:|--:|--:|---|---|",
    ]
    for (operator, kernel, cells), shapes in groups.items():
        lines.append(
            f"| `{operator}` | `{kernel}` | {', '.join(shapes)} | {' | '.join(map(str, cells))} |"
        )
    return "\n".join(lines)


def _gemm_table(record: dict[str, Any], arch: str = "sm_90") -> str:
    """Products of one architecture, ours and Triton's tutorial's: what they compile to, estimated shares at each width."""
    rows = [row for row in record["rows"] if row["arch"] == arch and row["widths"]]
    widths = sorted({entry["d_model"] for row in rows for entry in row["widths"]})
    lines = [
        f"ESTIMATES, not measurements: products (N, D) times (D, 4 D), N = {record['n_rows']:,}, compiled for {arch} without a",
        "GPU, ours and Triton's tutorial's in the best of its configurations; shares of the tensor peak by one reading of the",
        "machine code, blind to latency: of a step over D if no pipe waits for another; of the device at each D, epilogue and",
        f"idle multiprocessors included (triton {record['triton']}, commit {record['commit']}). From `bench/gemm_peers.py`.",
        "",
        f"| | tile | registers | spilled B | blocks/SM | step | {' | '.join(f'D = {D}' for D in widths)} |",
        f"|---|---|{'--:|' * (4 + len(widths))}",
    ]
    for row in rows:
        shares = {entry["d_model"]: f"{entry['device_share']:.0%}" for entry in row["widths"]}
        step = f"{row['hottest_loop']['estimate']['overlapped']:.0%}"
        cells = [
            "x".join(map(str, row["tile"])),
            row["registers"],
            row["spilled_bytes"],
            row["blocks_per_sm"],
            step,
        ]
        cells += [shares.get(D, "") for D in widths]
        lines.append(f"| {row['peer']} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench report`. Returns: exit status."""
    options = parse(
        ReportOptions,
        argv,
        prog="tritium bench report",
        description="Write README's figures from bench/results.",
    )
    if options.folder is None:
        changed = write_readme(Path(options.readme), figures())
        print(f"{options.readme}: {'figures written' if changed else 'figures are up to date'}")
        return 0
    folder = Path(options.folder)
    records = _records(folder) if folder.is_dir() else []
    if not records:
        raise InputError(
            f"{folder}: expected a folder with records of format {FORMAT} of {', '.join(KINDS)}, found none"
        )
    tables = (_kernel_tables, _training_table, _codegen_table, traffic_tables, _gemm_table)
    shown = dict(zip(KINDS, tables, strict=True))
    print("\n\n".join(shown[record["kind"]](record) for record in records))
    return 0
