"""The tables of the report about whole training runs."""

from collections.abc import Sequence
from typing import Any

from .record import describe_provenance

Record = dict[str, Any]


def sweep_table(record: Record) -> str:
    """Return the rows of a record as a table in Markdown, with the options that they change.

    The rounds of a row share a line: the mean, with the lowest and the highest value in brackets.
    """
    lines = [
        f"Variations of {record['recipe']}. A row that does not name its steps has "
        f"{record['seconds']:.0f} processor seconds for them ({describe_provenance(record)}).",
        *([record["note"]] if "note" in record else []),
        "",
        "| row | options | steps | processor seconds | seconds | bits per byte |",
        "|---|---|--:|--:|--:|--:|",
    ]
    rounds: dict[tuple[str, str], list[Record]] = {}
    for row in record["rows"]:
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        options = "; ".join(part for part in (options, row.get("note")) if part)
        rounds.setdefault((row["name"], options), []).append(row)
    for names, rows in rounds.items():
        cells = (
            _mean([row["steps"] for row in rows], ",.0f"),
            _mean([row["processor_seconds"] for row in rows], ".0f"),
            _mean([row["seconds"] for row in rows if "seconds" in row], ".0f"),
            _mean([row["bits_per_byte"] for row in rows], ".3f"),
        )
        lines.append(f"| {' | '.join((*names, *cells))} |")
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: str) -> str:
    """Return the mean, with the lowest and the highest value in brackets if they differ."""
    if not values:
        return "-"
    mean, low, high = (
        format(value, digits) for value in (sum(values) / len(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def runs_table(record: Record) -> str:
    """Return the training runs of a record, with their lowest and their last validation loss."""
    lines = [
        f"Runs of `tritium train` ({describe_provenance(record)}). The",
        "seconds include the start of the program, compilation, evaluations and samples:",
        "",
        "| run | optimizer | lr | dropout, of embeddings, of attention | steps | seconds "
        "| lowest loss, at step | last loss |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        if not row["evaluations"]:
            continue
        train = row["train"]
        step, lowest = min(row["evaluations"], key=lambda pair: pair[1])
        dropouts = [train[name] for name in ("dropout", "embedding_dropout", "attention_dropout")]
        last_step, last = row["evaluations"][-1]
        cells = [
            row["name"],
            train["optimizer"],
            f"{train['lr']}",
            ", ".join(map(str, dropouts)),
            f"{last_step:,} of {train['steps']:,}",
            "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
            f"{lowest:.4f}, {step:,}",
            f"{last:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", record["note"]] if "note" in record else [])])


def nanogpt_table(record: Record) -> str:
    """Return a run of an earlier command that trained nanoGPT and tritium as two programs."""
    steps = {name: f"{rate:.1f}" for name, rate in record["steps_per_second"].items()}
    ratios = ", ".join(f"{ratio:.2f}" for ratio in record["ratio_by_round"])
    losses = {name: f"{values[-1]:.4f}" for name, values in record["val_loss"].items()}
    lines = [
        f"shakespeare-char, {record['steps']:,} steps, {record['rounds']} rounds,",
        f"nanoGPT and tritium as two programs in turn ({describe_provenance(record)}).",
        "The command was removed since; `tritium bench train --nanogpt` replaces it:",
        "",
        "| | nanoGPT | tritium | tritium / nanoGPT, by round |",
        "|---|--:|--:|--:|",
        f"| steps per second, median | {steps['nanogpt']} | {steps['tritium']} | {ratios} |",
        f"| validation loss | {losses['nanogpt']} | {losses['tritium']} | |",
    ]
    return "\n".join(lines)
