"""The tables in the pages that come from files of measurements and from the recipes.

A page has `<!-- generated: NAME -->`, the table, and `<!-- end -->`. docs/build.py writes the
tables again, and a test compares them. No figure is typed by hand.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tritium.bench.record import describe_provenance, read_record
from tritium.bench.report import RESULTS, training_table
from tritium.model.cost import parameters
from tritium.train.data.tokenizer import vocab_size_of
from tritium.train.recipes import RECIPES

MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """Return the text of a page with its tables written again."""
    return MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", page)


def write_all(folder: Path) -> None:
    """Write the tables of all pages in a folder again, without its folders."""
    for page in sorted(folder.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            page.write_text(filled, encoding="utf-8")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table. All columns after the first `texts` are numbers, aligned to the right."""
    assert all(len(row) == len(head) for row in rows)
    rule = ["---"] * texts + ["--:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def step_by_part() -> str:
    """Return the predicted and the measured milliseconds of each part of a step of gpt2."""
    files = {gpu: RESULTS / gpu / "profile.json" for gpu in ("h100", "h200")}
    records = {gpu: read_record(file, "predict") for gpu, file in files.items()}
    columns: dict[str, dict[str, str]] = defaultdict(dict)
    for gpu, record in records.items():
        (step,) = record["steps"]
        sums = {
            "floor": _by_part(step["rows"], "floor_seconds"),
            "predicted": _by_part(step["rows"], "seconds"),
            "measured": _by_part(step["measured"]["rows"], "seconds"),
        }
        for name, parts in sums.items():
            for part, seconds in [*parts.items(), ("step", sum(parts.values()))]:
                columns[part][f"{gpu.upper()}, {name}"] = f"{1e3 * seconds:.1f}"
    head = list(columns["step"])
    last = ["between operators", "step"]
    order = [part for part in columns if part not in last] + last
    rows = [[part, *(columns[part].get(name, "-") for name in head)] for part in order]
    places = [describe_provenance({**each, "device": "cuda"}) for each in records.values()]
    return "\n".join([markdown(["part, ms", *head], rows), "", *(f"{each}." for each in places)])


def _by_part(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        sums[row["part"]] += row[key]
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def predicted_steps() -> str:
    """Return the estimated steps of the GPT-2 recipes."""
    record = read_record(RESULTS / "predict.json", "predict")
    rows = [
        [
            step["recipe"],
            step["gpu_name"].upper(),
            f"{step['batch']} x {step['context_tokens']:,}",
            str(step["micro_batch"]),
            f"{1e3 * step['floor_seconds']:,.0f}",
            f"{1e3 * step['seconds']:,.0f}",
            f"{step['tokens_per_second']:,.0f}",
            f"{step['mfu']:.1%}",
        ]
        for step in record["steps"]
        if step["batch"] == 512
    ]
    head = ["recipe", "GPU", "tokens per step", "micro-batch", "floor, ms", "estimate, ms"]
    return markdown([*head, "estimate, tokens/s", "MFU"], rows, texts=3)


def measured_steps() -> str:
    """Return the measured throughput of gpt2 next to its baselines, on each GPU."""
    short = read_record(RESULTS / "h100" / "short.json", "device")
    files = [RESULTS / "h200" / f"train-{batch}.json" for batch in (512, 32)]
    records = [read_record(file, "train") for file in files]
    records += [short["records"][f"train-{batch}.json"] for batch in (64, 32)]
    return "\n\n".join(training_table(each, speeds=True) for each in records)


def recipes() -> str:
    """Return the size, the data and the schedule of each recipe."""
    rows = []
    for name, config in RECIPES.items():
        shape = config.model
        tokens = config.batch_size * shape.context_tokens
        rows.append(
            [
                f"`{name}`",
                ", ".join(config.data),
                config.tokenizer,
                f"{shape.n_layer} x {shape.d_model}",
                f"{parameters(config.gpt(vocab_size_of(config.tokenizer))) / 1e6:,.1f}",
                f"{tokens:,}",
                f"{config.steps:,}",
                f"{config.steps * tokens / 1e6:,.1f}",
                f"{config.lr:g}",
            ]
        )
    size = ["layers x width", "million parameters"]
    schedule = ["tokens per step", "steps", "million tokens", "peak lr"]
    return markdown(["recipe", "data", "tokenizer", *size, *schedule], rows, texts=3)


TABLES: dict[str, Callable[[], str]] = {
    "step-by-part": step_by_part,
    "predicted-steps": predicted_steps,
    "measured-steps": measured_steps,
    "recipes": recipes,
}
