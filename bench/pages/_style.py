"""How all pictures look: colors that color-blind readers can tell apart, on white, as small SVG."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

BLUE, ORANGE, GRAY, DARK, SKY, RUST, LIGHT = (
    *("#006BA4", "#FF800E", "#ABABAB", "#404040", "#A2C8EC", "#C85200", "#EDEDED"),
)
SETTINGS = {
    # Text stays text: smaller files, and it can be searched.
    "svg.fonttype": "none",
    # The same picture has the same bytes.
    "svg.hashsalt": "tritium",
    "font.family": "sans-serif",
    # Verdana has the widths of DejaVu Sans, with which matplotlib computes the layout.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure. Its size is in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, without the date."""
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def style():
    """Return a context manager in which pictures have the settings of this file."""
    return matplotlib.rc_context(SETTINGS)
