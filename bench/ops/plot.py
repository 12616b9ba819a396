"""Plots of measured figures, as a talk would show them."""

from pathlib import Path
from typing import Any

# Of the colour-blind-safe palette of Okabe and Ito; ours is the first.
_COLOURS = (
    "#d55e00",
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#999999",
    "#b5a642",
)


def plot_contest(entries: list[dict[str, Any]], ceilings: dict[str, float], folder: Path) -> Path:
    """Draw FOLDER/OPERATOR.png: throughput of each contestant over the shapes, forward and backward, the ceiling dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_bytes = entries[0]["bound"] == "bytes"
    unit, scale = ("GB/s", 1e9) if by_bytes else ("TFLOP/s", 1e12)
    ceiling = ceilings["bytes_per_second" if by_bytes else "flops_per_second"] / scale
    names = list(dict.fromkeys(row["contestant"] for entry in entries for row in entry["rows"]))
    timed = {row["direction"] for entry in entries for row in entry["rows"]}
    directions = [direction for direction in ("forward", "backward") if direction in timed]
    size = (1 + 5 * len(directions), 4.4)
    figure, panels = pyplot.subplots(
        1, len(directions), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    panels = panels[0]
    for axes, direction in zip(panels, directions, strict=True):
        for name, colour in zip(names, _COLOURS * 2, strict=False):
            points = [
                (place, row["rate"] / scale)
                for place, entry in enumerate(entries)
                for row in entry["rows"]
                if (row["contestant"], row["direction"]) == (name, direction)
            ]
            ours = name == "tritium"
            axes.plot(
                *zip(*points, strict=True),
                "o-",
                color=colour,
                label=name,
                linewidth=2.4 if ours else 1.4,
                zorder=3 if ours else 2,
            )
        axes.axhline(
            ceiling,
            color="#444444",
            linestyle="--",
            linewidth=1,
            label=f"ceiling of this machine, {ceiling:,.3g}",
        )
        axes.set_xticks(
            range(len(entries)),
            ["\n".join(entry["label"].split()) for entry in entries],
            fontsize=8,
        )
        axes.set_title(direction)
        axes.set_ylim(0, None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel(unit)
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(entries[0]["operator"], fontweight="bold")
    path = folder / f"{entries[0]['operator']}.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
