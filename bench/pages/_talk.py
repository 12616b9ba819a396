"""Pictures for a talk, drawn from bench/results: bytes of a block, a step, speeds, a CPU's runs."""

from typing import Any

from matplotlib.figure import Figure

from .. import RESULTS
from ..record import read_record
from ._style import BLUE, GRAY, ORANGE, RUST, SKY, new_figure

# A color per part of a step, in the order in which parts are stacked.
PARTS = {
    "MLP": BLUE,
    "head + loss": ORANGE,
    "attention": SKY,
    "matmul": RUST,
    "norms": "#FFBC79",
    "optimizer": "#595959",
    "embedding": "#898989",
    "other": GRAY,
}
# Training records: file in bench/results, and the key of the record if the file has several.
SPEEDS = (
    ("h100/short.json", "train-32.json"),
    ("h200/train-32.json", None),
    ("h200/train-512.json", None),
)
LABELS = {
    "laptop": "tritium train laptop",
    "nanoGPT": "nanoGPT, a model of the same shape",
    "laptop before": "the recipe laptop before",
}
NAMES = {"baseline": "plain PyTorch,\ncompiled", "nanoGPT": "nanoGPT,\ncompiled"}


def block_bytes() -> Figure:
    """Draw the bytes that GPT-2's block moves per token, ours and eager PyTorch's."""
    record = read_record(RESULTS / "traffic.json", "traffic")
    row = record["blocks"][0]
    bars = {
        "eager PyTorch": [row["eager"][each]["token_bytes"] for each in ("forward", "backward")],
        "tritium": [row["tritium"][each]["token_bytes"] for each in ("forward", "backward")],
        "least possible": [row["least"][each] for each in ("forward", "backward")],
    }
    figure = new_figure(7.2, 2.8)
    axes = figure.subplots()
    for place, (forward, backward) in enumerate(bars.values()):
        for left, width, color in ((0, forward, SKY), (forward, backward, BLUE)):
            axes.barh(place, width / 1e3, left=left / 1e3, color=color, edgecolor="white")
            text_color = "white" if color == BLUE else "black"
            middle = (left + width / 2) / 1e3
            label = f"{width / 1e3:.0f}"
            axes.text(middle, place, label, ha="center", va="center", color=text_color)
        total = (forward + backward) / 1e3
        axes.text(total + 1, place, f"{total:.0f} kB", va="center")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(
        title=f"{row['preset']}: bytes that a block moves per token, forward (light), backward",
        xlabel="kB per token, bfloat16. Counted from the operators that run, not timed.\n"
        f"bench/results/traffic.json, commit {record['commit']}",
    )
    axes.margins(x=0.12)
    return figure


def predicted_step() -> Figure:
    """Draw the parts of predicted steps of GPT-2. They are estimates."""
    record = read_record(RESULTS / "predict.json", "predict")
    steps = [step for step in record["steps"] if step["recipe"] == "gpt2"]
    figure = new_figure(8.4, 3.2)
    axes = figure.subplots()
    for place, step in enumerate(steps):
        left, tokens = 0.0, step["batch"] * step["context_tokens"]
        for part, color in PARTS.items():
            width = 1e9 * step["parts"].get(part, 0.0) / tokens
            label = part if place == 0 else None
            axes.barh(place, width, left=left, color=color, edgecolor="white", lw=0.5, label=label)
            left += width
        floor = 1e9 * step["floor_seconds"] / tokens
        axes.plot([floor, floor], [place - 0.42, place + 0.42], color="black", linewidth=1.5)
        speed = f"{left:,.0f} ns, {step['tokens_per_second'] / 1e3:,.0f}k tokens/s"
        axes.text(left + 15, place, speed, va="center")
    names = [
        f"{step['gpu_name'].upper()}, {step['batch']} sequences"
        + (f"\nin micro-batches of {step['micro_batch']}" * (step["batch"] > step["micro_batch"]))
        for step in steps
    ]
    axes.set_yticks(range(len(steps)), names)
    axes.invert_yaxis()
    axes.set(title="ESTIMATE: GPU time of a training step of gpt2, per token", xlim=(0, 2350))
    axes.set_xlabel(
        "nanoseconds per token. Black line: the floor, if every kernel ran at a limit of the GPU.\n"
        f"Nothing here is measured. bench/results/predict.json, commit {record['commit']}"
    )
    figure.legend(loc="outside right center", frameon=False)
    return figure


def throughput() -> Figure:
    """Draw measured tokens per second of GPT-2 on each GPU."""
    figure = new_figure(9.6, 3.6)
    panels = figure.subplots(1, len(SPEEDS), sharey=True)
    for axes, (file, part) in zip(panels, SPEEDS, strict=True):
        record = _training_record(file, part)
        micro_batch = record["micro_batch_size"]
        sequences = record.get("batch_size", micro_batch)
        tokens = sequences * record["context_tokens"]
        for place, (name, row) in enumerate(record["implementations"].items()):
            height = row["tokens_per_second"] / 1e3
            color = BLUE if name == "tritium" else SKY
            axes.bar(place, height, color=color, width=0.7)
            spread = [tokens / row["step_seconds"][each] / 1e3 for each in ("p10", "p90")]
            axes.plot([place, place], spread, color="black", linewidth=1.2)
            text_color = "white" if name == "tritium" else "black"
            label = f"{height:,.0f}k\n{row['mfu']:.1%}\nMFU"
            axes.text(place, height / 2, label, ha="center", va="center", color=text_color)
        names = [NAMES.get(name, name) for name in record["implementations"]]
        axes.set_xticks(range(len(names)), names)
        axes.set_title(
            f"{record['gpu']}\n{sequences} x {record['context_tokens']:,} tokens per step"
        )
        axes.set_xlabel(
            f"micro-batches of {micro_batch}; {record['date']}\ncommit {record['commit']}, torch "
            f"{record['torch']}",
            size=7.5,
        )
    panels[0].set_ylabel("thousand tokens per second")
    figure.suptitle(
        "gpt2 (124M), bfloat16: measured training speed. Lines: 10th to 90th percentile of steps.",
        fontsize=10,
    )
    return figure


def equal_time() -> Figure:
    """Draw bits per byte against processor time of runs on a CPU."""
    sweep = read_record(RESULTS / "sweep-laptop-cpu.json", "sweep")
    runs = read_record(RESULTS / "default-run-again-cpu.json", "sweep")
    earlier = read_record(RESULTS / "default-run-rounds-cpu.json", "sweep")
    figure = new_figure(7.2, 3.6)
    axes = figure.subplots()
    tried = sweep["rows"]
    axes.scatter(*_times_and_bits(tried), color=GRAY, s=18, label="variations that were tried")
    colors = {"laptop": BLUE, "nanoGPT": ORANGE, "laptop before": SKY}
    for name, color in colors.items():
        record = earlier if name == "laptop before" else runs
        rows = [row for row in record["rows"] if row["name"] == name]
        axes.scatter(*_times_and_bits(rows), color=color, s=40, label=LABELS[name])
    axes.set(
        xlabel=f"processor seconds, {runs['cpu']}, {runs['date']}, commit {runs['commit']}\n"
        "bench/results/default-run-again-cpu.json, default-run-rounds-cpu.json and "
        "sweep-laptop-cpu.json",
        ylabel="bits per byte, held-out Python",
        title="Runs on a CPU with the same text and the same held-out files",
        xlim=(0, None),
    )
    axes.legend(frameon=False)
    return figure


def _times_and_bits(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["processor_seconds"] for row in rows], [row["bits_per_byte"] for row in rows]


def _training_record(file: str, part: str | None) -> dict[str, Any]:
    if part is None:
        return read_record(RESULTS / file, "train")
    return read_record(RESULTS / file, "device")["records"][part]
