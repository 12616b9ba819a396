"""Pictures of the kernels that walk rows: norms, RoPE, the embedding and the loss of logits."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...kernels.core.partial_sums import COLUMNS_PER_PROGRAM
from ...kernels.core.triton import cdiv
from ...kernels.embedding import PIECE
from ...kernels.loss import launch as loss
from ...kernels.norm import launch as norm
from ...kernels.rotary import plan as rotary_plan
from ._style import BLUE, DARK, GRAY, ORANGE, RUST, SKY, new_figure
from ._trace import trace

COLORS = (BLUE, ORANGE, SKY, GRAY)


def _box(axes: Axes, x: float, y: float, width: float, height: float, color: str, **more) -> None:
    options = {"edgecolor": "white", "linewidth": 0.7, **more}
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, **options))


def _label(axes: Axes, x: float, y: float, text: str, background: str) -> None:
    """Write text on a box, in a color that can be read there."""
    color = "white" if background in (BLUE, RUST) else "black"
    axes.text(x, y, text, ha="center", va="center", size=7, color=color)


def norms() -> Figure:
    """Draw the rows of a norm's forward, and the two stages of the backward's sums."""
    M, N, sms = 28, 768, 1
    plan = norm.plan(M, N, sms)
    blocks = cdiv(M, plan.block_m)
    figure = new_figure(9.6, 4)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))

    axes = panels[0]
    axes.set_title("forward: one program per tile")
    for block in range(blocks):
        color = COLORS[block % 2 * 2]
        _box(axes, 0, block * plan.block_m, N, plan.block_m, color)
        _label(axes, N / 2, (block + 0.5) * plan.block_m, f"program {block}", color)

    axes = panels[1]
    axes.set_title(f"backward: {plan.partials} programs take turns")
    for program in range(plan.partials):
        (loop,) = trace(
            norm._layer_norm_bwd_kernel,
            {"range": 0, "_fold": 1},
            program=(program,),
            programs=(plan.partials,),
            M=M,
            N=N,
            BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n,
            seed_ptr=None,
            dh_ptr=None,
        )[:1]
        for block in loop["numbers"]:
            _box(axes, 0, block * plan.block_m, N, plan.block_m, COLORS[program])
            middle = (block + 0.5) * plan.block_m
            _label(axes, N / 2, middle, f"program {program}", COLORS[program])
    for axes in panels[:2]:
        axes.set(xlim=(0, N), ylim=(M, 0), xlabel=f"N = {N} columns")
        axes.set_xticks([0, N])
    panels[0].set_ylabel(f"M = {M} rows, {plan.block_m} per tile")

    _draw_sums(panels[2], plan.partials, N)
    figure.supxlabel(
        f"A GPU with {sms} multiprocessor, to keep the picture small: the backward starts 4 "
        "programs per multiprocessor.",
        size=8,
    )
    return figure


def _draw_sums(axes: Axes, partials: int, N: int) -> None:
    """Draw the rows of partial sums, and the kernel that adds them."""
    axes.set_title("sums for dw: two stages")
    for program in range(partials):
        _box(axes, 0, program, N, 1, COLORS[program])
        label = f"partial sums of program {program}"
        _label(axes, N / 2, program + 0.5, label, COLORS[program])
    top = partials + 2
    for start in range(0, N, COLUMNS_PER_PROGRAM):
        _box(axes, start, top, COLUMNS_PER_PROGRAM, 1, RUST)
    arrow = {"arrowstyle": "->", "color": DARK}
    axes.annotate("", xy=(N / 2, top), xytext=(N / 2, partials), arrowprops=arrow)
    note = f"second kernel: a program per {COLUMNS_PER_PROGRAM} columns"
    axes.text(N / 2 + 20, partials + 1, note, va="center", ha="left", size=7)
    axes.text(N / 2, top + 1.1, "dw, in a fixed order", ha="center", va="top", size=8)
    axes.set(xlim=(0, N * 1.5), ylim=(top + 2, 0))
    axes.axis("off")


def rope() -> Figure:
    """Draw a tile of heads, the pairs of a head, and the angles that they share."""
    B, T, H, K = 1, 8, 12, 64
    heads, pairs, _ = rotary_plan(B * T * H, K, K)
    figure = new_figure(7.2, 3.6)
    axes, table = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    for head in range(B * T * H):
        color = (BLUE, SKY)[head // H % 2]
        _box(axes, 0, head, pairs, 1, color, linewidth=0.2)
        _box(axes, pairs, head, pairs, 1, color, linewidth=0.2, alpha=0.7)
    for token in range(T):
        _box(table, 0, token * H, pairs, H, (BLUE, SKY)[token % 2])
        _label(table, pairs / 2, token * H + H / 2, f"token {token}", (BLUE, SKY)[token % 2])
    for panel, width in ((axes, K), (table, pairs)):
        options = {"fill": False, "edgecolor": "black", "linewidth": 2}
        panel.add_patch(Rectangle((0, heads), width, heads, **options))
        panel.set(xlim=(0, width), xticks=(0, pairs, width) if width == K else (0, pairs))
    axes.set(ylim=(B * T * H, 0), ylabel="heads in the order of y", xlabel="elements of a head")
    axes.set_title("x and y: element i pairs with i + 32")
    table.set(title="cos and sin", xlabel="pairs")
    figure.supxlabel(
        f"Black: one program rotates {heads} heads of {K} elements. All {H} heads of a token use "
        "the same angles.",
        size=8,
    )
    return figure


def logits() -> Figure:
    """Draw how a program walks a row of logits."""
    V, rows, zoom = 50_257, 4, 40
    tile = loss.plan(V, 2, "sm_90")
    step = tile.block_v * tile.unroll
    figure = new_figure(9, 2.9)
    start, whole = figure.subplots(1, 2, width_ratios=(1, 2.6), sharey=True)
    for row in range(rows):
        # _split of loss/_kernels.py: columns before the first aligned address, and columns of the
        # loop without a mask.
        lead = -row * V % tile.vec
        body = (V - lead) // step * step
        for axes in (start, whole):
            _box(axes, 0, row + 0.15, lead, 0.7, ORANGE)
        for number, first in enumerate(range(lead, lead + body, step)):
            for axes in (start, whole):
                _box(axes, first, row + 0.15, step, 0.7, (BLUE, SKY)[number % 2])
        for first in range(lead + body, V, tile.block_v):
            _box(whole, first, row + 0.15, min(tile.block_v, V - first), 0.7, ORANGE)
        for first in range(lead, zoom, tile.vec):
            start.plot([first, first], [row + 0.15, row + 0.85], color="white", linewidth=0.7)
    start.set(xlim=(0, zoom), ylim=(rows, 0), xlabel=f"first {zoom} columns, loads of {tile.vec}")
    start.set_yticks([row + 0.5 for row in range(rows)], [f"program {row}" for row in range(rows)])
    whole.set(xlim=(0, V), xlabel="all columns of the row")
    whole.set_xticks([0, step, 4 * step, 8 * step, V])
    figure.supxlabel(
        f"V = {V:,} in 16 bits. Blue: steps without a mask, {tile.unroll} loads x {tile.lanes} "
        f"threads x {tile.vec} = {step:,} logits. Orange: a masked loop takes the columns before\n"
        "the first address that is a multiple of 16 bytes, and the columns after the last step.",
        size=8,
    )
    return figure


def embedding_runs() -> Figure:
    """Draw the sorted tokens of the embedding's backward: runs, pieces and partial sums."""
    piece = 8
    tokens = np.repeat([3, 7, 9, 12, 15, 20], [4, 15, 5, 3, 9, 4])
    figure = new_figure(8.4, 2.9)
    axes = figure.subplots()
    values = list(dict.fromkeys(tokens.tolist()))
    for place, token in enumerate(tokens):
        color = COLORS[values.index(token) % 3]
        _box(axes, place, 0, 1, 1, color)
        _label(axes, place + 0.5, 0.5, str(token), color)
    for start in range(0, len(tokens) + 1, piece):
        axes.plot([start, start], [-0.35, 1.35], color="black", linewidth=1.5)
    for start in range(0, len(tokens), piece):
        axes.text(start + piece / 2, -0.15, f"piece {start // piece}", ha="center", size=8)

    # A program sums the part of a run that is in one piece.
    for token in values:
        places = np.flatnonzero(tokens == token)
        parts = [places[places // piece == number] for number in np.unique(places // piece)]
        for part in parts:
            left, right = part[0], part[-1] + 1
            axes.plot([left + 0.1, right - 0.1], [1.6, 1.6], color=DARK, linewidth=2)
            text = f"dw[{token}]" if len(parts) == 1 else "partial"
            axes.text((left + right) / 2, 1.75, text, ha="center", va="top", size=7)
        if len(parts) > 1:
            middle = (places[0] + places[-1] + 1) / 2
            joined = f"second kernel: dw[{token}]"
            axes.plot([places[0] + 0.1, places[-1] + 0.9], [2.45, 2.45], color=RUST, linewidth=2)
            axes.text(middle, 2.6, joined, ha="center", va="top", size=7)
    axes.set(xlim=(-0.2, len(tokens) + 0.2), ylim=(3.1, -0.6))
    axes.axis("off")
    axes.set_title("tokens, sorted: a run is a group of equal tokens")
    figure.supxlabel(
        f"Pieces of {piece} tokens, to keep the picture small: the code has pieces of "
        f"{PIECE}. Each line is one program, which adds rows of dy in order.",
        size=8,
    )
    return figure
