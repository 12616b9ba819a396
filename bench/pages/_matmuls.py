"""Pictures of the kernels around matmuls: the order of tiles, and the chunks of the loss."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...kernels.core.triton import cdiv
from ...kernels.loss import chunks
from ...kernels.mlp import gemm
from ._style import BLUE, DARK, GRAY, LIGHT, ORANGE, SKY, new_figure
from ._trace import trace


def tile_order(rows: int, columns: int, programs: int) -> list[list[tuple[int, int]]]:
    """Return the tiles (row, column) of c that each program of the GEMM computes, in its order."""
    size = 128
    order = []
    for program in range(programs):
        calls = trace(
            gemm._gemm_kernel,
            {"_finish": 0, "_load_tile": 1},
            program=(program,),
            programs=(programs,),
            **{"M": rows * size, "N": columns * size, "K": size, "aux_ptr": None},
            **{"EPILOGUE": None, "PARTS": 1, "GROUP_M": gemm.GROUP_M},
            **{"BLOCK_M": size, "BLOCK_N": size, "BLOCK_K": size},
        )
        finished = [call for call in calls if call["helper"] == "_finish"]
        order.append([(call["row"] // size, call["column"] // size) for call in finished])
    return order


def gemm_order() -> Figure:
    """Draw the order in which the programs of a GEMM take the tiles of c."""
    rows, columns, programs = 12, 8, 16
    figure = new_figure(6.4, 5)
    axes = figure.subplots()
    for program, tiles in enumerate(tile_order(rows, columns, programs)):
        for turn, (row, column) in enumerate(tiles):
            color = (BLUE, ORANGE, SKY, GRAY)[turn % 4]
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white"))
            number = turn * programs + program
            middle = (column + 0.5, row + 0.5)
            text_color = "white" if color == BLUE else "black"
            axes.text(*middle, str(number), ha="center", va="center", size=8, color=text_color)
    axes.axhline(gemm.GROUP_M, color="black", linewidth=2)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel="columns of tiles", ylabel="rows of tiles")
    axes.set_title(f"tiles of c: {programs} programs, groups of {gemm.GROUP_M} rows of tiles")
    figure.supxlabel(
        f"Tiles of one color are computed at the same time. They share {gemm.GROUP_M} tiles of "
        f"rows of a\nand {programs // gemm.GROUP_M} tiles of columns of b, which stay in the L2 "
        "cache.",
        size=8,
    )
    return figure


def loss_chunks() -> Figure:
    """Draw the chunks of linear_cross_entropy to scale, at GPT-2's size on an H100."""
    N, D, V = 16_384, 768, 50_304
    rows = chunks.plan(N, V, D, 132)
    figure = new_figure(9, 4)
    axes = figure.subplots()
    # Widths are to scale, except that D is drawn wider: V is 65 times D.
    wide, narrow, gap, high = 50.0, 6.0, 5.0, 16.0
    logits, gradient = narrow + gap, narrow + wide + 2 * gap
    count = cdiv(N, rows)
    for number in range(count):
        top, bottom = number * rows / N * high, min(N, (number + 1) * rows) / N * high
        is_now = number == 1
        color = ORANGE if is_now else LIGHT
        _matrix(axes, 0, top, narrow, bottom - top, (SKY, ORANGE)[is_now], f"x\nchunk {number}")
        text = (
            f"chunk {number}: {min(rows, N - number * rows):,} x {V:,} logits,\nthen dlogits in "
            "the same memory"
        )
        later = "in the same memory, " + ("earlier" if number < 1 else "later")
        _matrix(axes, logits, top, wide, bottom - top, color, text if is_now else later)
        dx = (GRAY, ORANGE)[is_now] if number <= 1 else LIGHT
        _matrix(axes, gradient, top, narrow, bottom - top, dx, f"dx\nchunk {number}")
    _matrix(axes, logits, -7, wide, narrow, SKY, "w (V, D)")
    _matrix(axes, logits, high + 1.5, wide, narrow, BLUE, "dw (V, D) += dlogits$^T$ x", "white")
    middle = 1.5 * rows / N * high
    arrow = {"arrowstyle": "->", "color": DARK, "linewidth": 1.5}
    axes.annotate("", xy=(logits, middle), xytext=(narrow, middle), arrowprops=arrow)
    axes.annotate("", xy=(gradient, middle), xytext=(logits + wide, middle), arrowprops=arrow)
    axes.set(xlim=(-1, gradient + narrow + 1), ylim=(high + 2 + narrow, -7.5))
    axes.axis("off")
    figure.supxlabel(
        f"N = {N:,} tokens, D = {D}, V = {V:,} on a GPU with 132 multiprocessors: {count} chunks. "
        "Rows and V are to scale, D is not.",
        size=8,
    )
    return figure


def _matrix(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    text: str,
    text_color: str = DARK,
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white"))
    middle = (x + width / 2, y + height / 2)
    axes.text(*middle, text, ha="center", va="center", size=8, color=text_color)
