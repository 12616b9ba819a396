"""Pictures of the tiles that the attention kernels walk, traced from the kernels themselves."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ...kernels.attention import decode, launch
from ...kernels.core.triton import cdiv
from ._style import BLUE, DARK, GRAY, LIGHT, ORANGE, SKY, new_figure
from ._trace import trace

ARCH, HEAD = "sm_90", 64
LENGTHS = (220, 90, 460, 254)
# Addresses of the stand-ins of cu_seqlens and of the list of tiles.
SEQLENS_POINTER, WORK_POINTER = 10_000, 20_000
# Key -> the kernel, its helper with the loop, and how many values the helper returns.
KERNELS = {
    "fwd": (launch._causal_attention_fwd_kernel, "_fwd_loop", 3),
    "dq": (launch._causal_attention_bwd_dq_kernel, "_dq_loop", 1),
    "dkdv": (launch._causal_attention_bwd_dkdv_kernel, "_dkdv_loop", 2),
}


def walk(
    kernel: str, T: int, *, window: int | None = None, lengths: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Return the tiles of one head in the order of the launch.

    A tile has queries (first, end), keys (first, end), is_masked and program.
    """
    function, helper, count = KERNELS[kernel]
    has_option = window is not None or bool(lengths)
    tile = launch.plan(kernel, HEAD, torch.bfloat16, ARCH, options=int(has_option))
    owned = tile.block_n if kernel == "dkdv" else tile.block_m
    work, values = _documents(lengths, owned)
    tiles = len(work) if lengths else cdiv(T, owned)
    arguments = {
        **{"cu_seqlens_ptr": None, "work_ptr": None, "seed_ptr": None, "softcap": None},
        **{"dlse_ptr": None, "dq_sums_ptr": None, "dkv_sums_ptr": None, "threshold": None},
        **{"T": T, "S": T, "H": 1, "group": 1, "tiles": tiles, "heads": 1, "heads_at_once": 1},
        **{"scale": 1.0, "window": window, "keep": None, **tile.arguments(HEAD)},
    }
    if lengths:
        arguments |= {"cu_seqlens_ptr": SEQLENS_POINTER, "work_ptr": WORK_POINTER}
    found = []
    for program in range(tiles):
        calls = trace(
            function,
            {helper: count},
            program=(program,),
            programs=(tiles,),
            values=values,
            **arguments,
        )
        for call in calls:
            found += _tiles_of(call, program, kernel)
    return found


def _documents(lengths: tuple[int, ...], block: int) -> tuple[list, dict[int, int]]:
    """Return the list (document, tile), the most work first, and the numbers in memory."""
    tiles = [(d, tile) for d, length in enumerate(lengths) for tile in range(cdiv(length, block))]
    tiles.sort(key=lambda pair: (-pair[1], pair[0]))
    starts = [sum(lengths[:d]) for d in range(len(lengths) + 1)]
    values = {SEQLENS_POINTER + d: start for d, start in enumerate(starts)}
    for rank, pair in enumerate(tiles):
        values |= {WORK_POINTER + 2 * rank + part: number for part, number in enumerate(pair)}
    return tiles, values


def _tiles_of(call: dict[str, Any], program: int, kernel: str) -> list[dict[str, Any]]:
    """Return the tiles of one call of a loop over keys, or over queries."""
    is_keys = kernel == "dkdv"
    looped, owned = ("BLOCK_M", "BLOCK_N") if is_keys else ("BLOCK_N", "BLOCK_M")
    first = call["first_key" if is_keys else "first_query"]
    length = call["T" if is_keys else "S"]
    own = (call["start"] + first, call["start"] + min(first + call[owned], length))
    found = []
    for begin in range(call["lo"], call["hi"], call[looped]):
        other = (call["start"] + begin, call["start"] + min(begin + call[looped], length))
        queries, keys = (other, own) if is_keys else (own, other)
        found.append(
            {"queries": queries, "keys": keys, "is_masked": call["IS_EDGE"], "program": program}
        )
    return found


# --- pictures


def forward() -> Figure:
    """Draw the forward: without a window, with one, and with documents."""
    T = 1024
    figure = new_figure(9.6, 4.1)
    panels = figure.subplots(1, 3)
    for axes, title, options in zip(
        panels,
        ("causal", "window = 300", "documents (varlen)"),
        ({}, {"window": 300}, {"lengths": LENGTHS}),
        strict=True,
    ):
        tiles = walk("fwd", T, **options)
        _panel(axes, tiles, T, title, one_program=_program_at(tiles, "queries", 700))
    panels[0].set_ylabel("queries")
    _legend(figure, "one program: a tile of queries, a loop over keys")
    return figure


def backward() -> Figure:
    """Draw the two passes of the backward."""
    T = 1024
    figure = new_figure(8, 4.6)
    for axes, kernel, title, side in zip(
        figure.subplots(1, 2),
        ("dq", "dkdv"),
        ("pass 1: dq, a loop over keys", "pass 2: dk and dv, a loop over queries"),
        ("queries", "keys"),
        strict=True,
    ):
        tiles = walk(kernel, T)
        at = 700 if side == "queries" else 330
        _panel(axes, tiles, T, title, one_program=_program_at(tiles, side, at))
        axes.set_ylabel("queries")
    _legend(figure, "one program")
    return figure


def varlen() -> Figure:
    """Draw packed documents, and the order in which programs take their tiles."""
    T = sum(LENGTHS)
    figure = new_figure(8.6, 5.2)
    axes, order = figure.subplots(1, 2, width_ratios=(3, 1))
    tiles = walk("fwd", T, lengths=LENGTHS)
    _panel(axes, tiles, T, "tiles of one head", one_program=_program_at(tiles, "queries", 700))
    axes.set_ylabel("queries")
    seen = set()
    for tile in tiles:
        if tile["program"] not in seen:
            seen.add(tile["program"])
            middle = sum(tile["queries"]) / 2
            left = min(one["keys"][0] for one in tiles if one["program"] == tile["program"])
            axes.text(left - 8, middle, str(tile["program"]), ha="right", va="center", size=7)
    starts = [sum(LENGTHS[:d]) for d in range(len(LENGTHS))]
    for d, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
        axes.add_patch(Rectangle((start, start), length, length, fill=False, ec=DARK, ls=":"))
        axes.text(start + length + 12, start + 12, f"document {d}", va="top", size=8)

    # The list that a small kernel writes on the device.
    block = launch.plan("fwd", HEAD, torch.bfloat16, ARCH, options=1).block_m
    work, _ = _documents(LENGTHS, block)
    cells = [[str(rank), str(document), str(tile)] for rank, (document, tile) in enumerate(work)]
    order.axis("off")
    table = order.table(cells, colLabels=["program", "document", "tile"], loc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    order.set_title("the list of tiles")
    _legend(figure, "one program")
    return figure


def _program_at(tiles: list[dict], side: str, token: int) -> int:
    return next(tile["program"] for tile in tiles if tile[side][0] <= token < tile[side][1])


def _panel(axes: Axes, tiles: list[dict], T: int, title: str, *, one_program: int) -> None:
    """Draw tiles: queries downward, keys to the right."""
    for tile in tiles:
        (top, bottom), (left, right) = tile["queries"], tile["keys"]
        color = ORANGE if tile["is_masked"] else BLUE
        axes.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, facecolor=color, edgecolor="white", lw=0.7
            )
        )
    axes.plot([0, T], [0, T], color=DARK, linewidth=0.8)

    # One program, and the direction of its loop.
    own = [tile for tile in tiles if tile["program"] == one_program]
    left, right = min(tile["keys"][0] for tile in own), max(tile["keys"][1] for tile in own)
    top, bottom = min(tile["queries"][0] for tile in own), max(tile["queries"][1] for tile in own)
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec="black", lw=2))
    is_row = bottom - top < right - left
    middle = ((left + right) / 2, (top + bottom) / 2)
    begin, end = ((left + 15, middle[1]), (right - 10, middle[1]))
    if not is_row:
        begin, end = ((middle[0], top + 15), (middle[0], bottom - 10))
    arrow = {"arrowstyle": "->", "color": "white", "linewidth": 1.8}
    axes.annotate("", xy=end, xytext=begin, arrowprops=arrow)

    sizes = {tile["queries"][1] - tile["queries"][0] for tile in tiles}
    widths = {tile["keys"][1] - tile["keys"][0] for tile in tiles}
    axes.set(xlim=(0, T), ylim=(T, 0), aspect="equal", title=title)
    axes.set_xlabel(f"keys; tiles of {max(sizes)} queries x {max(widths)} keys")
    axes.set_xticks(range(0, T + 1, 256))
    axes.set_yticks(range(0, T + 1, 256))
    axes.set_facecolor(LIGHT)


def _legend(figure: Figure, program: str) -> None:
    figure.legend(
        handles=[
            Patch(facecolor=BLUE, label="no mask: every query sees every key"),
            Patch(facecolor=ORANGE, label="masked: on the diagonal or the window's edge"),
            Patch(facecolor=LIGHT, label="not visited"),
            Patch(facecolor="none", edgecolor="black", linewidth=2, label=program),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )


def decode_splits() -> Figure:
    """Draw how programs share the keys of a cache, for sequences of different lengths."""
    lengths, heads, S = (4096, 2600, 900), 2, 4096
    B = len(lengths)
    plan = decode.plan(B, 1, S, 8, heads, HEAD, 2, sms=12)
    figure = new_figure(8, 3.3)
    axes = figure.subplots()
    for batch, length in enumerate(lengths):
        for split in range(plan.splits):
            # Key heads of a sequence have the same splits: draw one.
            calls = trace(
                decode._attention_decode_kernel,
                {"_load_rows": 1},
                program=(batch, 0, split),
                programs=(B, heads, plan.splits),
                values={batch: length},
                **{"lengths_ptr": 0, "B": B, "T": 1, "S": S, "H": 8, "group": 4},
                **{"splits": plan.splits, "scale": 1.0, "window": None, "softcap": None},
                **{"HEAD": HEAD, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n},
                BLOCK_K=plan.block_k,
            )
            # Each tile is loaded twice: keys, then values.
            for call in calls[::2]:
                first, end = call["first"], min(call["first"] + plan.block_n, call["end"])
                color = (BLUE, SKY)[split % 2]
                axes.add_patch(
                    Rectangle((first, batch - 0.3), end - first, 0.6, fc=color, ec="white", lw=0.7)
                )
            if calls:
                middle = (calls[0]["first"] + min(calls[-1]["end"], length)) / 2
                axes.text(middle, batch - 0.38, str(split), ha="center", va="bottom", size=8)
        axes.add_patch(Rectangle((length, batch - 0.3), S - length, 0.6, fc=LIGHT, ec=GRAY, lw=0.5))
    labels = [f"sequence {b}\n{length:,} tokens" for b, length in enumerate(lengths)]
    axes.set_yticks(range(B), labels)
    axes.set(xlim=(0, S), ylim=(B - 0.5, -0.75), xticks=range(0, S + 1, 1024))
    axes.set_xlabel(
        f"tokens in the cache; tiles of {plan.block_n} keys; above each bar: the number of the "
        "split; gray: not read.\nEach split of each key head is one program. A second kernel joins "
        "the splits."
    )
    return figure
