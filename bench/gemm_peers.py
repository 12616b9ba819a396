"""Our persistent product at GPT-2's widths and the one of Triton's tutorial, compiled for GPUs that need not be there.

    python -m tritium.bench.gemm_peers [--tutorial PATH/03-matrix-multiplication.py] [--arch ARCH ...] [--out FILE.json]

The tutorial is python/tutorials/03-matrix-multiplication.py of triton-lang/triton. How its launcher comes to run, and which of
its configurations is shown, says peers.py. All products are (N, D) times (D, F), N = 32,768 rows, F = 4 D. Ours are bfloat16:
plain, x w1^T + b1 with GELU and both kept, dy w2 with GELU's slope and sums of columns, as gemm() and the perceptron launch
them. The tutorial's are float16, which tensor pipes take at the same rate: plain, and with the activation that it fuses. Every
size divides by 16, so that the machine code is the same at each width: it is read once, and only steps and tiles differ.

No figure here is a measurement. Clocks are estimates by one reading of the machine code (machine_code.py), blind to latency:

    overlapped    the tensor pipe's share of a step of the loop over K if no pipe ever waited for another
    serial        the same if nothing overlapped
    once a tile   of a persistent kernel what most steps of its loop pass over, the epilogue; of others all that stands around
                  the loop: addresses, epilogue, steps that are not in it. Where it branches both ways count
    tile share    steps t / ((steps - s) l + o): t the tensor clocks of each of ceil(D / BLOCK_K) steps, s of which are not in
                  the loop, l and o those of the slowest pipe in a step and once a tile, without memory: nothing runs beside an
                  epilogue. Where blocks share a multiprocessor, one runs beside the other's
    device share  that times tiles / (ceil(tiles / P) P): the last tiles leave some of P multiprocessors idle
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from ..kernels._device import DEFAULT_SM_COUNT
from ..kernels._gemm import gemm
from ..kernels._triton import cdiv
from ..kernels.mlp import launch_gelu_mlp_bwd, launch_linear_gelu_fwd
from ..train.cli import run
from .codegen import DTYPE, describe, rounded
from .launches import Launch
from .machine_code import RATES, loop_clocks
from .peers import Peer, best, function, imported, kernels_of, tutorial_version, write_rows
from .record import writable

N, WIDTHS = 32_768, (768, 1024, 1280, 1600)


# --- the products


def _meta(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _plain(D: int) -> None:
    gemm(_meta(N, D), _meta(D, 4 * D))


def _gelu(D: int) -> None:
    launch_linear_gelu_fwd(_meta(N, D), _meta(4 * D, D), _meta(4 * D), "tanh", "fused")


def _gelu_bwd(D: int) -> None:
    x, w1, w2, h = _meta(N, D), _meta(4 * D, D), _meta(D, 4 * D), _meta(N, 4 * D)
    launch_gelu_mlp_bwd(x, x, w1, w2, h, h, "tanh", "fused", [True] * 5)


OURS: dict[str, Callable[[int], None]] = {"tritium": _plain, "tritium, GELU": _gelu, "tritium, GELU's gradient": _gelu_bwd}


def tutorial_peers(path: Path) -> list[Peer]:
    """The tutorial as it measures itself, and with the activation that it fuses."""
    version = tutorial_version(path, "03-matrix-multiplication.py")

    def launches(D: int, activation: str) -> None:
        a, b = (_meta(*shape, dtype=torch.float16) for shape in ((N, D), (D, 4 * D)))
        with imported(path.stem, path.parent, last="matmul") as module:
            function(module, "matmul")(a, b, activation=activation)

    return [
        Peer(name="tutorial", version=version, launches=lambda D: launches(D, "")),
        Peer(name="tutorial, leaky_relu", version=version, launches=lambda D: launches(D, "leaky_relu")),
    ]


# --- rows


def rows_of(peer: Peer, arch: str) -> list[dict[str, Any]]:
    """A peer's product at all widths for one architecture: a row, or one for each machine code if widths differ in it."""
    read: dict[str, dict] = {}

    def once(launch: Launch, compiled, text: str) -> dict[str, Any]:
        if compiled.hash not in read:
            read[compiled.hash] = _describe(launch, compiled, text, arch)
        return read[compiled.hash]

    rows: dict[str, dict] = {}
    for D in WIDTHS:
        # What else is launched adds up the partial sums that a product left.
        candidates = next(iter(kernels_of(peer, D, arch).values()))
        found = {"peer": peer.name, "arch": arch, **best(candidates, arch, once)}
        row = rows.setdefault(repr(found), {**found, "widths": []})
        if "hottest_loop" in row:
            row["widths"].append({"d_model": D, **shares(row, D)})
    return list(rows.values())


def _describe(launch: Launch, compiled, text: str, arch: str) -> dict[str, Any]:
    sizes = launch.arguments.items()
    tile = [next(value for name, value in sizes if re.fullmatch(f"BLOCK_(SIZE_)?{axis}", name)) for axis in "MNK"]
    row = {"tile": tile, **describe(compiled, text, arch)}
    loop = row.get("hottest_loop", {})
    # A program for each multiprocessor walks several tiles.
    if math.prod(launch.grid) <= DEFAULT_SM_COUNT and "now_and_then" in loop:
        row["once_a_tile"] = loop.pop("now_and_then")
    elif loop:
        *_, (around, clocks) = loop_clocks(compiled, text, arch)
        row["once_a_tile"] = {"instructions": len(around), "clocks": rounded(clocks)}
    return row


def shares(row: dict[str, Any], D: int) -> dict[str, Any]:
    """Steps and tiles of a product at one width, and ESTIMATED shares of the tensor peak: of a tile, of the whole device."""
    block_m, block_n, block_k = row["tile"]
    steps, tiles = cdiv(D, block_k), cdiv(N, block_m) * cdiv(4 * D, block_n)
    multiprocessors = RATES[row["arch"]].multiprocessors
    loop, once = row["hottest_loop"]["clocks"], row["once_a_tile"]["clocks"]
    others = once["tensor"] / loop["tensor"]
    share = steps * loop["tensor"] / ((steps - others) * slowest(loop) + slowest(once))
    filled = tiles / (cdiv(tiles, multiprocessors) * multiprocessors)
    return {"steps": steps, "tiles": tiles, "tile_share": round(share, 3), "device_share": round(share * filled, 3)}


def slowest(clocks: dict[str, float]) -> float:
    """Clocks of the pipe that is occupied longest, memory left out."""
    return max(value for pipe, value in clocks.items() if pipe != "memory")


# --- the command


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Products of all peers beside one another."""
    columns = ("tile", "warps", "registers", "spilled B", "shared B", "blocks/SM", "matrix", "TMA")
    columns += ("instructions", "tensor", "slowest", "overlapped", "serial", "once a tile", "slowest")
    title = f"triton {triton.__version__}: ESTIMATED clocks of a step and of a tile, shares of the tensor peak: tile, device"
    table = Table("arch", "peer", *columns, *(f"D={D}" for D in WIDTHS), title=title)
    for row in sorted(rows, key=lambda row: list(RATES).index(row["arch"])):
        table.add_row(row["arch"], row["peer"], *_cells(row))
    Console(width=None if Console().is_terminal else 260).print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    if "hottest_loop" not in row:
        return [row.get("error", "warps are specialized")[:60]]
    loop, once, estimate = row["hottest_loop"], row["once_a_tile"], row["hottest_loop"]["estimate"]
    widths = {entry["d_model"]: f"{entry['tile_share']:.0%} {entry['device_share']:.0%}" for entry in row["widths"]}
    return [
        "x".join(map(str, row["tile"])),
        *(str(row[name]) for name in ("num_warps", "registers", "spilled_bytes", "shared_bytes", "blocks_per_sm")),
        ", ".join(row["matrix_instructions"]), str(row["tma_loads"]), str(loop["instructions"]),
        f"{loop['clocks']['tensor']:.0f}", f"{slowest(loop['clocks']):.0f} {estimate['slowest']}",
        *(f"{estimate[name]:.0%}" for name in ("overlapped", "serial")),
        str(once["instructions"]), f"{slowest(once['clocks']):.0f}",
        *(widths.get(D, "") for D in WIDTHS),
    ]  # fmt: skip


def compare(argv: Sequence[str]) -> int:
    """Parse the command line, compile, print and write. Returns: exit status."""
    parser = argparse.ArgumentParser(prog="python -m tritium.bench.gemm_peers", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tutorial", type=Path, help="triton-lang/triton's python/tutorials/03-matrix-multiplication.py")
    parser.add_argument("--arch", nargs="+", choices=list(RATES), default=list(RATES), help="default: all")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args(argv)
    peers = [Peer(name=name, version={}, launches=launches) for name, launches in OURS.items()]
    peers += tutorial_peers(options.tutorial.resolve()) if options.tutorial else []
    out = None if options.out is None else writable(options.out)
    rows = [row for peer in peers for arch in options.arch for row in rows_of(peer, arch)]
    print_table(rows)
    write_rows(out, "gemm_peers", peers, {"n_rows": N, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run(compare, sys.argv[1:]))
