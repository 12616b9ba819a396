"""The generated tables of docs/*.md: recipes, and predicted and measured training steps."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ...model.cost import parameters
from ...train.data.tokenizers.tokenizer import vocab_size_of
from ...train.recipes import RECIPES
from .. import RESULTS
from ..record import describe_provenance, read_record
from ._tables import table


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
    return "\n".join([table(["part, ms", *head], rows), "", *(f"- {each}" for each in places)])


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
    return table([*head, "estimate, tokens/s", "MFU"], rows, texts=3)


def measured_steps() -> str:
    """Return the measured throughput of models next to their baselines, a row per record."""
    short = read_record(RESULTS / "h100" / "short.json", "device")
    files = [RESULTS / "h200" / f"train-{batch}.json" for batch in (512, 32)]
    records = [read_record(file, "train") for file in files]
    records += [short["records"][f"train-{batch}.json"] for batch in (64, 32)]
    for file, names in (
        ("shakespeare.json", ("shakespeare", "shakespeare-without-graph")),
        ("models.json", ("gpt2-medium", "gpt2-large", "gpt2-xl")),
    ):
        parts = read_record(RESULTS / "h200" / file, "device")["records"]
        records += [parts[f"{name}.json"] for name in names]
    head = ["model", "GPU", "tokens per step", "mode"]
    head += ["tritium", "MFU", "baseline", "nanoGPT", "peak memory, GB"]
    places = sorted({describe_provenance(record) for record in records})
    rows = [_throughput(record) for record in records]
    return "\n".join([table(head, rows, texts=4), "", *(f"- {each}" for each in places)])


def _throughput(record: dict[str, Any]) -> list[str]:
    """Return a row of measured_steps: tokens per second of tritium, and of its baselines."""
    implementations = record["implementations"]
    gpu = record["gpu"].removeprefix("NVIDIA ").split()[0]
    modes = []
    if not any(row["compiled"] for row in implementations.values()):
        modes.append("not compiled")
    if not record.get("cuda_graph", True):
        modes.append("no CUDA graphs")
    speeds, memory = {}, []
    for name in ("tritium", "baseline", "nanoGPT"):
        if name not in implementations:
            speeds[name] = "-"
            continue
        row = implementations[name]
        speeds[name] = f"{row['tokens_per_second']:,.0f}"
        if name != "tritium":
            speeds[name] += f" ({row['ratio']['median']:.2f}x)"
        memory.append(f"{row['peak_memory_bytes'] / 1e9:.1f}")
    return [
        record["recipe"],
        gpu,
        f"{record.get('batch_size', record['micro_batch_size'])} x {record['context_tokens']:,}",
        ", ".join(modes) or "default",
        speeds["tritium"],
        f"{implementations['tritium']['mfu']:.1%}",
        speeds["baseline"],
        speeds["nanoGPT"],
        " / ".join(memory),
    ]


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
                f"{parameters(config.gpt(vocab_size_of(config.tokenizer))) / 1e6:,.1f}M",
                f"{shape.n_layer}",
                f"{shape.d_model}",
                f"{tokens:,}",
                f"{config.steps:,}",
                f"{config.lr:g}",
            ]
        )
    size = ["parameters", "layers", "width"]
    schedule = ["tokens per step", "steps", "peak lr"]
    return table(["recipe", "data", "tokenizer", *size, *schedule], rows, texts=3)


SECTIONS = {
    "step-by-part": step_by_part,
    "predicted-steps": predicted_steps,
    "measured-steps": measured_steps,
    "recipes": recipes,
}
