"""Plots of throughput for slides."""

from pathlib import Path
from typing import Any


def plot_operator(entries: list[dict[str, Any]], ceilings: dict[str, float], folder: Path) -> Path:
    """Plot the throughput of each implementation over the shapes, forward and backward.

    Args:
        entries: entries of kernels.json, all of one operator.
        ceilings: ceilings of the same run. The one that bounds the operator is a dashed line.
        folder: where OPERATOR.png is written.
    Returns: path of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_bytes = entries[0]["bound"] == "bytes"
    unit, scale = ("GB/s", 1e9) if by_bytes else ("TFLOP/s", 1e12)
    ceiling = ceilings["bytes_per_second" if by_bytes else "flops_per_second"] / scale
    rows = [row for entry in entries for row in entry["rows"]]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    timed = {row["direction"] for row in rows}
    directions = [direction for direction in ("forward", "backward") if direction in timed]

    size = (1 + 5 * len(directions), 4.4)
    # Colours that colour-blind readers can tell apart.
    with pyplot.style.context("tableau-colorblind10"):
        figure, panels = pyplot.subplots(
            1, len(directions), figsize=size, sharey=True, layout="constrained", squeeze=False
        )
        for axes, direction in zip(panels[0], directions, strict=True):
            for name in names:
                points = [
                    (place, row["rate"] / scale)
                    for place, entry in enumerate(entries)
                    for row in entry["rows"]
                    if (row["implementation"], row["direction"]) == (name, direction)
                ]
                width = 2.4 if name == "tritium" else 1.4
                axes.plot(*zip(*points, strict=True), "o-", label=name, linewidth=width)
            label = f"ceiling of this machine, {ceiling:,.3g}"
            axes.axhline(ceiling, color="#444444", linestyle="--", linewidth=1, label=label)
            labels = ["\n".join(entry["label"].split()) for entry in entries]
            axes.set_xticks(range(len(entries)), labels, fontsize=8)
            axes.set(title=direction, ylim=(0, None))
            axes.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel(unit)
    panels[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(entries[0]["operator"], fontweight="bold")

    path = folder / f"{entries[0]['operator']}.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
