"""Print a record of `tritium bench train` on the terminal."""

import itertools
from typing import Any

Record = dict[str, Any]


def render(record: Record) -> str:
    """Return a record and its provenance as text."""
    lines = [*_header(record), "", *_speeds(record), *_ratios(record), *_notes(record)]
    return "\n".join([*lines, "", *_losses(record), "", *_profiles(record["profile"])])


def _header(record: Record) -> list[str]:
    machine = f"{record['cpu']}, {record['threads']} threads"
    if record["device"] == "cuda":
        machine = record["gpu"]
    batch = f"{record['micro_batch_size']} x {record['context_tokens']} random tokens"
    return [
        f"{record['recipe']} on {machine}: {record['parameters']:,} parameters, "
        f"vocabulary {record['shape']['vocab_size']:,}, matmuls in {record['dtype']}",
        f"{batch} per step, {record['steps']} timed steps of each model, in turn, "
        f"after {record['warmup_steps']} warm-up steps",
    ]


def _speeds(record: Record) -> list[str]:
    titles = f"{'compiled':>9}{'tokens/s':>12}{'step ms':>10}{'p10 to p90':>18}"
    lines = [f"{'':24}{titles}{'MFU':>7}{'peak memory':>14}"]
    for name, row in record["implementations"].items():
        median, p10, p90 = (1e3 * row["step_seconds"][key] for key in ("median", "p10", "p90"))
        compiled = "yes" if row["compiled"] else "no"
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        peak = row["peak_memory_bytes"]
        memory = "-" if peak is None else f"{peak / 1e9:.2f} GB"
        lines.append(
            f"{name:24}{compiled:>9}{row['tokens_per_second']:12,.0f}{median:10.2f}"
            f"{f'{p10:.2f} to {p90:.2f}':>18}{mfu:>7}{memory:>14}"
        )
    return lines


def _ratios(record: Record) -> list[str]:
    """Compare tritium with the baseline and nanoGPT, and name a faster attention."""
    rows = record["implementations"]
    lines = []
    for name, row in rows.items():
        if row["kind"] in ("baseline", "nanoGPT"):
            ratio, p10, p90 = (row["ratio"][key] for key in ("median", "p10", "p90"))
            spread = f"(p10 to p90 of the rounds: {p10:.2f} to {p90:.2f})"
            lines.append(f"tritium has {ratio:.2f} times the tokens/s of {name} {spread}")
    # Faster in nine of ten rounds, which is more than noise.
    faster = [
        row
        for row in rows.values()
        if row["kind"].startswith("tritium, ") and row["ratio"]["p90"] < 1
    ]
    if faster:
        fastest = min(faster, key=lambda row: row["ratio"]["median"])
        attention = fastest["kind"].split()[-1]
        lines.append(
            f"--attention {attention} is faster here: {1 / fastest['ratio']['median']:.2f} times "
            "the tokens/s of tritium's own attention"
        )
    return lines


def _notes(record: Record) -> list[str]:
    lines = []
    if record["device"] == "cpu":
        lines.append(
            "No Triton kernel runs on a CPU, so the ratios say nothing about a GPU. "
            "Peak memory is not measured."
        )
    if record["implementations"]["tritium"]["mfu"] is None:
        lines.append("No MFU: the table in kernels/core/device.py does not have this device.")
    return lines


def _losses(record: Record) -> list[str]:
    """Show six steps of each loss, and how far apart the losses and gradients are."""
    losses = {name: row["losses"] for name, row in record["implementations"].items()}
    last = len(losses["tritium"]) - 1
    steps = sorted({round(place * last / 5) for place in range(6)})
    lines = [f"{'loss, step':24}" + "".join(f"{step + 1:>10}" for step in steps)]
    for name, values in losses.items():
        lines.append(f"{name:24}" + "".join(f"{values[step]:10.4f}" for step in steps))
    for name, found in record["agreement"].items():
        gaps = [abs(a - b) / b for a, b in zip(losses[name], losses["baseline"], strict=True)]
        lines += [
            f"{name} and baseline: losses differ by at most {max(gaps):.1e}, relative;",
            f"  first batch: loss by {found['loss_gap']:.1e} (bound {found['loss_bound']:.1e}), "
            f"gradients by {found['gradient_gap']:.1e} of their norm "
            f"(bound {found['gradient_bound']:.1e})",
        ]
    return lines


def _profiles(profiles: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Show two profiles side by side."""
    columns = []
    for name, rows in profiles.items():
        lines = [f"{f'{name}: time per step':42}{'ms':>8}{'share':>7}"]
        for row in rows:
            lines.append(f"{_shorten(row):42}{1e3 * row['seconds']:8.2f}{row['share']:7.1%}")
        columns.append(lines)
    return ["   ".join(pair).rstrip() for pair in itertools.zip_longest(*columns, fillvalue="")]


def _shorten(row: dict[str, Any]) -> str:
    """Return part and operator in at most 40 characters: the start, and the end with its suffix."""
    name = f"{row['part']}: {row['operator']}".removesuffix(": ")
    return name if len(name) <= 40 else f"{name[:19]}...{name[-18:]}"
